"""Convolutions as matrix products, for weights that change from call to call.

XNNPACK's convolutions want constant weights, but its batched product takes two variable operands. What is
multiplied with the weights is a window view of the padded input, made by one `as_strided_copy`: ExecuTorch
copies it in rows, several times faster than slices and a concatenation.

Shape letters: N samples, G groups, I and O channels in and out per group, K kernel positions, P output
positions. Everything here is two-dimensional; a sequence is an image of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

aten = torch.ops.aten


@dataclass(frozen=True)
class Windows:
    """Along one dimension: output position p, tap j reads input position `first + p * step + j * spacing`."""

    first: int
    step: int
    spacing: int
    taps: int
    positions: int

    def padding(self, size: int) -> tuple[int, int]:
        """Zeros that must stand before and after an input of this size."""
        last = self.first + (self.positions - 1) * self.step + (self.taps - 1) * self.spacing
        return max(0, -self.first), max(0, last + 1 - size)


def windows(x: Tensor, rows: Windows, columns: Windows, groups: int, *, taps_first: bool) -> Tensor:
    """Gathers windows of an image [N, C, H, W].

    Returns:
        [G, N*P, K*I], or with `taps_first` [G, K*I, N*P] where K and I are in the order I, K.
    """
    N, C = x.shape[:2]
    if 1 < groups < C and not taps_first:
        # Too many axes for XNNPACK's tensors: one group after the other.
        return torch.cat([windows(part, rows, columns, 1, taps_first=False) for part in torch.split(x, C // groups, 1)])
    (top, bottom), (left, right) = rows.padding(x.shape[2]), columns.padding(x.shape[3])
    I, P, K = C // groups, rows.positions * columns.positions, rows.taps * columns.taps
    if top or bottom or left or right:
        x = aten.constant_pad_nd.default(x, [left, right, top, bottom])
    if not taps_first:
        x = x.permute(0, 2, 3, 1).contiguous()
        n, h, w, c = x.stride()
    else:
        n, c, h, w = x.stride()
    # First and last are counted in the padded image.
    start = (rows.first + top) * h + (columns.first + left) * w
    group = (groups, I * c)
    sample = [(N, n), (rows.positions, rows.step * h), (columns.positions, columns.step * w)]
    taps = [(rows.taps, rows.spacing * h), (columns.taps, columns.spacing * w)]
    axes = [group, (I, c), *taps, *sample] if taps_first else [group, *sample, *taps, (I, c)]
    axes = _merge(axes)
    sizes, strides = [size for size, _ in axes], [stride for _, stride in axes]
    if start == 0 and _is_whole(x, sizes, strides):
        gathered = x
    else:
        gathered = aten.as_strided_copy.default(x, sizes, strides, start)
    return gathered.reshape([groups, K * I, N * P] if taps_first else [groups, N * P, K * I])


def _merge(axes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer axes (size, stride) that visit the same elements in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = merged[-1][0] * size, stride
        else:
            merged.append((size, stride))
    return merged or [(1, 1)]


def _is_whole(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the view is the tensor itself, as for a kernel of 1 x 1."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return expected == x.numel()


def taps(x: Tensor, rows: Windows, columns: Windows) -> list[Tensor]:
    """What each kernel position sees of an image [N, H, W, C]: [N, rows, columns, C] each."""
    N, H, W, C = x.shape
    (top, bottom), (left, right) = rows.padding(H), columns.padding(W)
    if top or bottom or left or right:
        x = aten.constant_pad_nd.default(x, [0, 0, left, right, top, bottom])
    n, h, w, _ = x.stride()
    sizes, strides = [N, rows.positions, columns.positions, C], [n, rows.step * h, columns.step * w, 1]
    starts = [
        (rows.first + top + i * rows.spacing) * h + (columns.first + left + j * columns.spacing) * w
        for i in range(rows.taps)
        for j in range(columns.taps)
    ]
    if len(starts) == 1 and sizes == list(x.shape):
        return [x]
    return [aten.as_strided_copy.default(x, sizes, strides, start) for start in starts]


def multiply_channels(x: Tensor, weight_KC: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """Windows of each channel times its own weights [K, C], summed over the taps -> [N, C, rows, columns].

    A matrix product would have a single column per channel; multiplying and adding whole images is faster.
    """
    image = x.permute(0, 2, 3, 1).contiguous()
    total: Tensor | None = None
    for k, tap in enumerate(taps(image, rows, columns)):
        product = tap * weight_KC[k : k + 1]
        total = product if total is None else total + product
    assert total is not None
    return total.permute(0, 3, 1, 2).contiguous()


def multiply(x: Tensor, weight_GKO: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """Windows times weights [G, K*I, O] -> image [N, G*O, rows, columns]."""
    N, G, O = x.shape[0], weight_GKO.shape[0], weight_GKO.shape[2]
    product = torch.bmm(windows(x, rows, columns, G, taps_first=False), weight_GKO)
    image = product.reshape(G, N, rows.positions * columns.positions, O).permute(1, 0, 3, 2)
    return image.reshape(N, G * O, rows.positions, columns.positions)


@dataclass(frozen=True)
class Geometry:
    """A convolution's settings, two numbers each: rows, columns."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def depthwise(self, weight: Tensor) -> bool:
        """Whether each channel has weights of its own and nothing else."""
        return self.groups == weight.shape[0] and weight.shape[1] == 1 and self.groups > 1

    def forward(self, positions: Sequence[int]) -> list[Windows]:
        """What each output position reads."""
        return [
            Windows(-padding, stride, dilation, kernel, count)
            for padding, stride, dilation, kernel, count in zip(
                self.padding, self.stride, self.dilation, self.kernel, positions, strict=True
            )
        ]


def convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """[N, G*I, H, W] with weights [G*O, I, kh, kw] -> [N, G*O, H', W']."""
    G, (O, I) = geometry.groups, weight.shape[:2]
    positions = [
        (x.shape[2 + i] + 2 * geometry.padding[i] - geometry.dilation[i] * (geometry.kernel[i] - 1) - 1)
        // geometry.stride[i]
        + 1
        for i in range(2)
    ]
    K = math.prod(geometry.kernel)
    if geometry.depthwise(weight):
        return multiply_channels(x, weight.reshape(O, K).permute(1, 0), *geometry.forward(positions))
    matrix = weight.reshape(G, O // G, I, K).permute(0, 3, 2, 1).reshape(G, K * I, O // G)
    return multiply(x, matrix, *geometry.forward(positions))


def weight_gradient(x: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """[G*O, I, kh, kw] from the input and the gradient of the output [N, G*O, H', W']."""
    G, N = geometry.groups, x.shape[0]
    O, I, P = grad.shape[1] // G, x.shape[1] // G, math.prod(grad.shape[2:])
    if I == 1 and O == 1 and G > 1:
        image = x.permute(0, 2, 3, 1).contiguous()
        channels = grad.permute(0, 2, 3, 1).contiguous()
        ones = ones_like_row(N * P)
        sums = [
            torch.bmm(ones, (tap * channels).reshape(1, N * P, G))
            for tap in taps(image, *geometry.forward(grad.shape[2:]))
        ]
        return torch.cat(sums, 1).reshape(-1, G).permute(1, 0).reshape(G, 1, *geometry.kernel)
    rows, columns = geometry.forward(grad.shape[2:])
    gathered = windows(x, rows, columns, G, taps_first=True)
    right = grad.reshape(N, G, O, P).permute(1, 0, 3, 2).reshape(G, N * P, O)
    product = torch.bmm(gathered, right)
    return product.permute(0, 2, 1).reshape(G * O, I, *geometry.kernel)


def input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry, size: Sequence[int]) -> Tensor:
    """[N, G*I, *size] from the gradient of the output and weights [G*O, I, kh, kw]: a transposed convolution.

    Input positions fall into stride x stride classes; each class is met by a subset of the kernel, at unit
    steps, so no product is spent on zeros.
    """
    G, (O, I) = geometry.groups, weight.shape[:2]
    N = grad.shape[0]
    kernel = weight.reshape(G, O // G, I, *geometry.kernel)
    counts = [-(-size[i] // geometry.stride[i]) for i in range(2)]
    classes = []
    for row in range(geometry.stride[0]):
        for column in range(geometry.stride[1]):
            found = [_class(geometry, i, offset, counts[i]) for i, offset in ((0, row), (1, column))]
            if any(part is None for part in found):
                classes.append(torch.zeros(N, G * I, *counts))
                continue
            (rows, row_taps), (columns, column_taps) = (part for part in found if part is not None)
            part = kernel[:, :, :, row_taps[0] : row_taps[-1] + 1 : _gap(row_taps)]
            part = part[:, :, :, :, column_taps[0] : column_taps[-1] + 1 : _gap(column_taps)]
            if geometry.depthwise(weight):
                matrix = _flip(part).reshape(G, len(row_taps) * len(column_taps)).permute(1, 0)
                classes.append(multiply_channels(grad, matrix, rows, columns))
                continue
            # Windows run upwards in the gradient, which is downwards in the kernel.
            matrix = _flip(part).permute(0, 3, 4, 1, 2)
            matrix = matrix.reshape(G, math.prod(matrix.shape[1:4]), I)
            classes.append(multiply(grad, matrix, rows, columns))
    if len(classes) == 1:
        return classes[0]
    whole = interleave(classes, geometry.stride)
    return whole[:, :, : size[0], : size[1]]


def interleave(parts: Sequence[Tensor], stride: Sequence[int]) -> Tensor:
    """Images [N, C, H, W], one per residue class, row by row -> [N, C, H*stride, W*stride]."""
    N, C, H, W = parts[0].shape
    stacked = torch.cat([part.reshape(1, N * C, H, W) for part in parts])
    stacked = stacked.reshape(*stride, N * C, H, W).permute(2, 3, 0, 4, 1)
    return stacked.reshape(N, C, H * stride[0], W * stride[1])


def _class(geometry: Geometry, i: int, offset: int, count: int) -> tuple[Windows, list[int]] | None:
    """Which taps reach input positions `offset + p * stride`, and what they read of the gradient."""
    stride, dilation = geometry.stride[i], geometry.dilation[i]
    reach = offset + geometry.padding[i]
    taps = [k for k in range(geometry.kernel[i]) if (reach - k * dilation) % stride == 0]
    if not taps:
        return None
    first = (reach - taps[-1] * dilation) // stride
    return Windows(first, 1, _gap(taps) * dilation // stride or 1, len(taps), count), taps


def _gap(taps: Sequence[int]) -> int:
    return taps[1] - taps[0] if len(taps) > 1 else 1


def ones_like_row(size: int) -> Tensor:
    """Ones, [1, 1, size]."""
    with disable_proxy_modes_tracing():
        return torch.ones(1, 1, size)


def _flip(kernel: Tensor) -> Tensor:
    """Reverses both kernel dimensions of [G, O, I, kh, kw], as a product with a mirrored identity."""
    kh, kw = kernel.shape[-2:]
    if kh * kw == 1:
        return kernel
    with disable_proxy_modes_tracing():
        mirror = torch.eye(kh * kw).flip(0).reshape(1, kh * kw, kh * kw)
    return torch.bmm(kernel.reshape(1, -1, kh * kw), mirror).reshape(kernel.shape)

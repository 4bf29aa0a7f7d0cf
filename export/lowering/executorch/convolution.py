"""Convolutions as matrix products, for weights that change from call to call.

XNNPACK's convolutions want constant weights, but its batched product takes two variable operands: `windows` of the
input, and the weights. Images are channels-last here: a product gives an image as it is, and sums over positions are
products too. `rewrite` keeps them so from layer to layer.

Shape letters: N samples, G groups, I and O channels in and out per group, K kernel positions, P output
positions. Everything here is two-dimensional; a sequence is an image of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from edgetrain.export.lowering.executorch.depthwise import MOST, Form, Side, cheapest
from edgetrain.export.lowering.executorch.pieces import piece
from edgetrain.export.lowering.executorch.products import LANES
from edgetrain.export.lowering.executorch.windows import (
    Windows,
    framed,
    interleave,
    padded,
    taps,
    visited,
    windows,
)

aten = torch.ops.aten

# Most positions of an image for each that is needed, where that makes longer runs.
WIDEST = 1.25
# Positions for each channel from which on a product for each row of the kernel costs a weight gradient no time.
MANY = 16


def multiply_channels(x_NHWC: Tensor, weight_KC: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """Windows of each channel times its own weights [K, C], summed over the taps -> [N, rows, columns, C].

    A matrix product would have a single column per channel; multiplying and adding whole images is faster.
    """
    total: Tensor | None = None
    for k, tap in enumerate(taps(x_NHWC, rows, columns)):
        product = tap * weight_KC[k : k + 1]
        total = product if total is None else total + product
    assert total is not None
    return total


def _is_narrow(width: int, columns: Windows) -> bool:
    """Whether a product of so many columns is better computed for two neighbouring positions at a time.

    It leaves most of the processor's lanes empty. Two at a time take a third more arithmetic (for three taps) and half
    the time, and a third less is gathered.
    """
    return 2 * width <= LANES and columns.step == columns.spacing == 1 < columns.taps


def _pairs(columns: Windows) -> Windows:
    """What two neighbouring positions see."""
    return replace(columns, step=2, taps=columns.taps + 1, positions=columns.positions // 2)


def _for_pairs(weight_GKO: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """Weights for two neighbouring positions, with zeros where one does not see what the other does."""
    _, KI, O = weight_GKO.shape
    weight = weight_GKO.reshape(rows.taps, columns.taps, KI // (rows.taps * columns.taps), O)
    first, second = (aten.constant_pad_nd.default(weight, [0, 0, 0, 0, t, 1 - t], 0.0) for t in (0, 1))
    return torch.cat([first, second], 3).reshape(1, -1, 2 * O)


def multiply(x_NHWC: Tensor, weight_GKO: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """Windows times weights [G, K*I, O] -> image [N, rows, columns, G*O]."""
    N, G, O = x_NHWC.shape[0], weight_GKO.shape[0], weight_GKO.shape[2]
    if G == 1 and columns.positions % 2 == 0 and _is_narrow(O, columns):
        image = multiply(x_NHWC, _for_pairs(weight_GKO, rows, columns), rows, _pairs(columns))
        return image.reshape(N, rows.positions, columns.positions, O)
    if G == 1 and _by_rows(x_NHWC.shape[1], rows):
        return _multiply_by_rows(x_NHWC, weight_GKO, rows, columns)
    product = torch.bmm(windows(x_NHWC, rows, columns, G), weight_GKO)
    if G > 1:
        product = product.permute(1, 0, 2)
    return product.reshape(N, rows.positions, columns.positions, G * O)


def _by_rows(size: int, rows: Windows) -> bool:
    """Whether images of so many lines are multiplied by one row of the kernel after the other."""
    lines = size + max(rows.padding(size))
    return (
        rows.step == 1 < rows.taps
        and rows.positions <= lines <= WIDEST * rows.positions
        # What the last image lacks is in one image of zeros.
        and rows.first + (rows.taps - 1) * rows.spacing <= size
    )


def _multiply_by_rows(x_NHWC: Tensor, weight_1KO: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """`multiply` as a sum of products, one for each row of the kernel.

    Only what the columns of the kernel see is gathered. What its rows see are pieces of that, which begin some lines
    later. Images share the lines of zeros between them; the products of those belong to no image and are cut away.
    """
    N, H, W, C = x_NHWC.shape
    (top, bottom), (left, right) = rows.padding(H), columns.padding(W)
    if N == 1:
        x, lines = framed(x_NHWC, left, right, top, bottom), rows.positions
    else:
        top = max(top, bottom)
        x, lines = framed(x_NHWC, left, right, top, behind=1), N * (top + H)
    _, line, column, _ = x.stride()
    Q, K = columns.positions, columns.taps * C
    gathered = visited(
        x,
        [
            (lines + (rows.taps - 1) * rows.spacing, line),
            (Q, columns.step * column),
            (columns.taps, columns.spacing * column),
            (C, 1),
        ],
        (rows.first + top) * line + (columns.first + left) * column,
    )
    total: Tensor | None = None
    for i in range(rows.taps):
        seen = piece(gathered, i * rows.spacing * Q * K, [1, lines * Q, K])
        product = torch.bmm(seen, weight_1KO[:, i * K : (i + 1) * K])
        total = product if total is None else total + product
    assert total is not None
    image = total.reshape(N, lines // N, -1)[:, : rows.positions].contiguous()
    return image.reshape(N, rows.positions, Q, -1)


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

    def in_blocks(self, weight: Tensor, size: Sequence[int], samples: int, *, gradient: bool) -> Form | None:
        """The quicker form of a depthwise convolution of inputs of this size, or of its gradients, if it has one."""
        if not self.depthwise(weight) or self.stride != (1, 1):
            return None
        rows, columns = (
            Side(self.kernel[i], self.dilation[i], self.padding[i], size[i], positions)
            for i, positions in enumerate(self.positions(size))
        )
        if gradient:
            rows, columns = rows.gradient(), columns.gradient()
        form = cheapest(rows, columns, samples)
        return form if form.cost(samples) <= MOST else None

    def positions(self, size: Sequence[int]) -> list[int]:
        """The size of the output for inputs of this size."""
        return [
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in range(2)
        ]

    def forward(self, positions: Sequence[int]) -> tuple[Windows, Windows]:
        """What each output row reads, and each column."""
        rows, columns = (
            Windows(-self.padding[i], self.stride[i], self.dilation[i], self.kernel[i], positions[i]) for i in range(2)
        )
        return rows, columns


def convolution(x_NHWC: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """[N, H, W, G*I] with weights [G*O, I, kh, kw] -> [N, H', W', G*O]."""
    G, (O, I) = geometry.groups, weight.shape[:2]
    positions = geometry.positions(x_NHWC.shape[1:3])
    K = math.prod(geometry.kernel)
    form = geometry.in_blocks(weight, x_NHWC.shape[1:3], len(x_NHWC), gradient=False)
    if form is not None:
        return form.multiply(form.read(x_NHWC), weight)
    if geometry.depthwise(weight):
        return multiply_channels(x_NHWC, weight.reshape(O, K).permute(1, 0), *geometry.forward(positions))
    matrix = weight.reshape(G, O // G, I, K).permute(0, 3, 2, 1).reshape(G, K * I, O // G)
    return multiply(x_NHWC, matrix, *geometry.forward(positions))


def gradients(
    x_NHWC: Tensor, grad_NHWC: Tensor, weight: Tensor, geometry: Geometry, *, by_input: bool, by_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`input_gradient` and `weight_gradient`, as far as wanted."""
    form = geometry.in_blocks(weight, x_NHWC.shape[1:3], len(x_NHWC), gradient=True)
    if form is not None:
        # One reading of the gradient serves both.
        read = form.read(grad_NHWC)
        return (
            form.multiply(read, weight) if by_input else None,
            form.weight_gradient(read, form.blocks_of(x_NHWC), weight.shape) if by_weight else None,
        )
    return (
        input_gradient(grad_NHWC, weight, geometry, x_NHWC.shape[1:3]) if by_input else None,
        weight_gradient(x_NHWC, grad_NHWC, geometry) if by_weight else None,
    )


def weight_gradient(x_NHWC: Tensor, grad_NHWC: Tensor, geometry: Geometry) -> Tensor:
    """[G*O, I, kh, kw] from the input and the gradient of the output [N, H', W', G*O]."""
    G, (N, H, W, C) = geometry.groups, grad_NHWC.shape
    O, I, P, K = C // G, x_NHWC.shape[3] // G, H * W, math.prod(geometry.kernel)
    if I == 1 and O == 1 and G > 1:
        seen, still = taps(x_NHWC, *geometry.forward((H, W))), grad_NHWC
        if geometry.stride == (1, 1):
            # The same sums, with the other one shifted: as for the input gradient, which then shares the shifts.
            seen, still = taps(grad_NHWC, *_downwards(geometry, x_NHWC.shape[1:3]))[::-1], x_NHWC
        ones = ones_like_row(still.numel() // G)
        sums = [torch.bmm(ones, (tap * still).reshape(1, -1, G)) for tap in seen]
        return torch.cat(sums, 1).reshape(-1, G).permute(1, 0).reshape(G, 1, *geometry.kernel)
    rows, columns = geometry.forward((H, W))
    if G == 1 and K > 1 and rows.step == columns.step == 1 and H * x_NHWC.shape[2] <= WIDEST * P:
        if rows.taps > 1 and O <= I <= N * P / MANY:
            return _weight_gradient_by_rows(x_NHWC, grad_NHWC, rows, columns).permute(3, 2, 0, 1)
        return _weight_gradient_in_runs(x_NHWC, grad_NHWC, rows, columns).permute(3, 0, 1, 2)
    left = grad_NHWC.reshape(N * P, G, O).permute(1, 2, 0)
    product = torch.bmm(left, windows(x_NHWC, rows, columns, G))
    return product.reshape(G * O, K, I).permute(0, 2, 1).reshape(G * O, I, *geometry.kernel)


def _weight_gradient_in_runs(x_NHWC: Tensor, grad_NHWC: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """[I, kh, kw, O]: windows with a row for each weight, times the gradient, the smaller one, which XNNPACK packs.

    Whole images are runs in such a row, with what lies beyond the end of a line, which meets zeros in the gradient.
    """
    N, H, W, O = grad_NHWC.shape
    # The last run reads beyond the end.
    x, *_ = padded(x_NHWC, rows, columns, spare=1)
    _, height, width, I = x.shape
    together = 2 if width % 2 == 0 and _is_narrow(O, columns) else 1
    grad, length = framed(grad_NHWC, 0, width - W), H * width // together
    # Tap j of positions `together` * q, `together` * q + 1, … is in column q + j // together of its residue class.
    x = x.reshape(-1, together * I).permute(1, 0).contiguous().reshape(together, I, N, height, width // together)
    residue, i, n, h, _ = x.stride()
    taps = -(-(columns.taps + together - 1) // together)
    gathered = visited(
        x, [(I, i), (rows.taps, rows.spacing * h), (taps, columns.spacing), (together, residue), (N, n), (length, 1)]
    )
    product = torch.bmm(gathered.reshape(1, -1, N * length), grad.reshape(1, N * length, together * O))
    product = product.reshape(I, rows.taps, taps * together, together * O)
    shares = [product[:, :, t : t + columns.taps, t * O : (t + 1) * O] for t in range(together)]
    return shares[0] if together == 1 else shares[0] + shares[1]


def _weight_gradient_by_rows(x_NHWC: Tensor, grad_NHWC: Tensor, rows: Windows, columns: Windows) -> Tensor:
    """[kh, kw, I, O]: as in runs, but only what columns of the kernel see is gathered.

    For its rows the gradient moves: pieces of it that begin some lines earlier, where zeros stand above each image.
    XNNPACK packs each of them, so it must be small beside the input, and images large.
    """
    N, H, W, O = grad_NHWC.shape
    # What is read for the last column of the kernel ends a line later.
    x, *_ = padded(x_NHWC, rows, columns, spare=1)
    _, height, width, I = x.shape
    together = 2 if width % 2 == 0 and _is_narrow(O, columns) else 1
    above, steps = height - H, N * height * width // together
    length = steps - width // together
    grad = framed(grad_NHWC, 0, width - W, above, behind=1)
    # Tap j of positions `together` * q, `together` * q + 1, … is in column q + j // together of its residue class.
    taps = -(-(columns.taps + together - 1) // together)
    x = x.reshape(steps, together * I).permute(1, 0).contiguous()
    gathered = visited(x, [(taps, columns.spacing), (together * I, steps), (length, 1)])
    gathered = gathered.reshape(1, taps * together * I, length)
    products = [
        torch.bmm(gathered, piece(grad, (above - i * rows.spacing) * width * O, [1, length, together * O]))
        for i in range(rows.taps)
    ]
    product = torch.cat(products).reshape(rows.taps, taps * together, I, together * O)
    shares = [product[:, t : t + columns.taps, :, t * O : (t + 1) * O] for t in range(together)]
    return shares[0] if together == 1 else shares[0] + shares[1]


def input_gradient(grad_NHWC: Tensor, weight: Tensor, geometry: Geometry, size: Sequence[int]) -> Tensor:
    """[N, *size, G*I] from the gradient of the output and weights [G*O, I, kh, kw]: a transposed convolution.

    Input positions fall into stride x stride classes; each class is met by a subset of the kernel, at unit
    steps, so no product is spent on zeros.
    """
    G, (O, I) = geometry.groups, weight.shape[:2]
    N = grad_NHWC.shape[0]
    kernel = weight.reshape(G, O // G, I, *geometry.kernel)
    counts = [-(-size[i] // geometry.stride[i]) for i in range(2)]
    classes = []
    for row in range(geometry.stride[0]):
        for column in range(geometry.stride[1]):
            found = [_class(geometry, i, offset, counts[i]) for i, offset in ((0, row), (1, column))]
            if any(part is None for part in found):
                classes.append(torch.zeros(N, *counts, G * I))
                continue
            (rows, row_taps), (columns, column_taps) = (part for part in found if part is not None)
            part = kernel[:, :, :, row_taps[0] : row_taps[-1] + 1 : _gap(row_taps)]
            part = part[:, :, :, :, column_taps[0] : column_taps[-1] + 1 : _gap(column_taps)]
            if geometry.depthwise(weight):
                matrix = _flip(part).reshape(G, len(row_taps) * len(column_taps)).permute(1, 0)
                classes.append(multiply_channels(grad_NHWC, matrix, rows, columns))
                continue
            # Windows run upwards in the gradient, which is downwards in the kernel.
            matrix = _flip(part).permute(0, 3, 4, 1, 2)
            matrix = matrix.reshape(G, math.prod(matrix.shape[1:4]), I)
            classes.append(multiply(grad_NHWC, matrix, rows, columns))
    if len(classes) == 1:
        return classes[0]
    whole = interleave(classes, geometry.stride)
    return whole[:, : size[0], : size[1]]


def _class(geometry: Geometry, i: int, offset: int, count: int) -> tuple[Windows, list[int]] | None:
    """Which taps reach input positions `offset + p * stride`, and what they read of the gradient."""
    stride, dilation = geometry.stride[i], geometry.dilation[i]
    reach = offset + geometry.padding[i]
    taps = [k for k in range(geometry.kernel[i]) if (reach - k * dilation) % stride == 0]
    if not taps:
        return None
    first = (reach - taps[-1] * dilation) // stride
    return Windows(first, 1, _gap(taps) * dilation // stride or 1, len(taps), count), taps


def _downwards(geometry: Geometry, size: Sequence[int]) -> tuple[Windows, Windows]:
    """What each input row and column meets of the gradient at unit strides, taps in reversed order."""
    (rows, _), (columns, _) = (found for i in range(2) if (found := _class(geometry, i, 0, size[i])))
    return rows, columns


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

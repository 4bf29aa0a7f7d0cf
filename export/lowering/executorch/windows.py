"""Windows of images: what each position of a convolution or a pooling reads.

A window view of the padded input is made by one `as_strided_copy`: ExecuTorch copies it in rows, several times faster
than slices and a concatenation. Images are channels-last, so windows are gathered in long runs.

Shape letters: N samples, G groups, I channels in per group, K kernel positions, P output positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def windows(x_NHWC: Tensor, rows: Windows, columns: Windows, groups: int) -> Tensor:
    """Gathers windows of an image [N, H, W, G*I] -> [G, N*P, K*I]."""
    N, _, _, C = x_NHWC.shape
    if 1 < groups < C:
        # Too many axes for XNNPACK's tensors: one group after the other.
        parts = torch.split(x_NHWC, C // groups, 3)
        return torch.cat([windows(part.contiguous(), rows, columns, 1) for part in parts])
    I, P, K = C // groups, rows.positions * columns.positions, rows.taps * columns.taps
    # As the weight gradient wants it, so that one serves both.
    x, top, left = padded(x_NHWC, rows, columns, spare=int(groups == rows.step == 1 < columns.taps))
    n, h, w, c = x.stride()
    # First and last are counted in the padded image.
    start = (rows.first + top) * h + (columns.first + left) * w
    sample = [(N, n), (rows.positions, rows.step * h), (columns.positions, columns.step * w)]
    taps = [(rows.taps, rows.spacing * h), (columns.taps, columns.spacing * w)]
    return visited(x, [(groups, I * c), *sample, *taps, (I, c)], start).reshape([groups, N * P, K * I])


def visited(x: Tensor, axes: Sequence[tuple[int, int]], start: int = 0) -> Tensor:
    """What axes (size, stride) visit from an element on: a copy, or the tensor itself."""
    fewer = merged(axes)
    sizes, strides = [size for size, _ in fewer], [stride for _, stride in fewer]
    if start == 0 and _is_whole(x, sizes, strides):
        return x
    copied: Tensor = aten.as_strided_copy.default(x, sizes, strides, start)
    return copied


def padded(
    x_NHWC: Tensor, rows: Windows, columns: Windows, value: float = 0.0, spare: int = 0
) -> tuple[Tensor, int, int]:
    """The image with all that windows reach and `spare` rows below; how many rows and columns were put before it."""
    (top, bottom), (left, right) = rows.padding(x_NHWC.shape[1]), columns.padding(x_NHWC.shape[2])
    return framed(x_NHWC, left, right, top, bottom + spare, value), top, left


def framed(
    x_NHWC: Tensor, left: int, right: int, top: int = 0, bottom: int = 0, value: float = 0.0, behind: int = 0
) -> Tensor:
    """The image with so many columns and rows of `value` around it, and so many images of it behind the last.

    XNNPACK copies rows of what lies behind the last padded dimension: whole lines of an image, several times faster
    than the channels of one position.
    """
    if not (left or right or top or bottom or behind):
        return x_NHWC
    N, H, W, C = x_NHWC.shape
    around = [left * C, right * C, top, bottom, *((0, behind) if behind else ())]
    lines: Tensor = aten.constant_pad_nd.default(x_NHWC.reshape(N, H, W * C), around, value)
    return lines.reshape(N + behind, top + H + bottom, left + W + right, C)


def merged(axes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer axes (size, stride) that visit the same elements in the same order."""
    fewer: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if fewer and fewer[-1][1] == size * stride:
            fewer[-1] = fewer[-1][0] * size, stride
        else:
            fewer.append((size, stride))
    return fewer or [(1, 1)]


def _is_whole(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the view is the tensor itself, as for a kernel of 1 x 1."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return expected == x.numel()


def taps(x_NHWC: Tensor, rows: Windows, columns: Windows, value: float = 0.0) -> list[Tensor]:
    """What each kernel position sees of an image [N, H, W, C], `value` outside of it: [N, rows, columns, C] each."""
    x, top, left = padded(x_NHWC, rows, columns, value)
    if rows.step == columns.step == 1:
        # Slices stay within the delegate.
        lefts = [columns.first + left + j * columns.spacing for j in range(columns.taps)]
        across = [x[:, :, start : start + columns.positions].contiguous() for start in lefts]
        tops = [rows.first + top + i * rows.spacing for i in range(rows.taps)]
        return [part[:, start : start + rows.positions].contiguous() for start in tops for part in across]
    n, h, w, _ = x.stride()
    sizes = [x.shape[0], rows.positions, columns.positions, x.shape[3]]
    strides = [n, rows.step * h, columns.step * w, 1]
    starts = [
        (rows.first + top + i * rows.spacing) * h + (columns.first + left + j * columns.spacing) * w
        for i in range(rows.taps)
        for j in range(columns.taps)
    ]
    if len(starts) == 1 and sizes == list(x.shape):
        return [x]
    return [aten.as_strided_copy.default(x, sizes, strides, start) for start in starts]


def interleave(parts: Sequence[Tensor], stride: Sequence[int]) -> Tensor:
    """Images [N, H, W, C], one per residue class, row by row -> [N, H*stride, W*stride, C]."""
    N, H, W, C = parts[0].shape
    stacked = torch.cat([part.reshape(1, N * H, W, C) for part in parts])
    stacked = stacked.reshape(*stride, N * H, W, C).permute(2, 0, 3, 1, 4)
    return stacked.reshape(N, H * stride[0], W * stride[1], C)

"""Max pooling and its gradient without indices.

The kernel of ExecuTorch's wheels for the backward pass adds into memory that it never clears, so its gradients
are silently wrong; this one is made of maxima and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgetrain.export.lowering.executorch_convolution import Windows, interleave
from edgetrain.export.lowering.executorch_decompositions import positive

aten = torch.ops.aten

LOWEST = torch.finfo(torch.float32).min


def _windows(
    positions: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Windows]:
    kernel, padding, dilation = (_pair(values) for values in (kernel_size, padding, dilation))
    stride = _pair(stride) if stride else kernel
    return [Windows(-padding[i], stride[i], dilation[i], kernel[i], positions[i]) for i in range(2)]


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


def _taps(x: Tensor, found: Sequence[Windows]) -> list[Tensor]:
    """For every position of the kernel, row by row: what it sees, [N, C, rows, columns]."""
    rows, columns = found
    (top, bottom), (left, right) = rows.padding(x.shape[2]), columns.padding(x.shape[3])
    if top or bottom or left or right:
        x = aten.constant_pad_nd.default(x, [left, right, top, bottom], LOWEST)
    N, C, H, W = x.shape
    sizes = [N, C, rows.positions, columns.positions]
    strides = [C * H * W, H * W, rows.step * W, columns.step]
    starts = [
        (rows.first + top + i * rows.spacing) * W + columns.first + left + j * columns.spacing
        for i in range(rows.taps)
        for j in range(columns.taps)
    ]
    return [aten.as_strided_copy.default(x, sizes, strides, start) for start in starts]


def max_pool(
    x: Tensor,
    positions: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Tensor:
    """Maxima of windows: [N, C, H, W] -> [N, C, *positions]."""
    del ceil_mode  # `positions` says it
    first, *rest = _taps(x, _windows(positions, kernel_size, stride, padding, dilation))
    for tap in rest:
        first = torch.maximum(first, tap)
    return first


def max_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Adds each gradient at the first maximum of its window, as torch does."""
    del ceil_mode
    found = _windows(grad.shape[2:], kernel_size, stride, padding, dilation)
    taps = _taps(x, found)
    largest = taps[0]
    for tap in taps[1:]:
        largest = torch.maximum(largest, tap)
    left = grad
    parts = []
    for tap in taps:
        below = positive(largest - tap)
        rest = left * below
        parts.append(left - rest)
        left = rest
    return _spread(parts, found, x.shape[2:])


def _spread(parts: Sequence[Tensor], found: Sequence[Windows], size: Sequence[int]) -> Tensor:
    """Adds every part at the input positions that its tap saw."""
    tiled = all(
        w.first == 0 and w.spacing == 1 and w.step == w.taps and w.positions * w.step <= s
        for w, s in zip(found, size, strict=True)
    )
    if tiled:
        whole = interleave(parts, [w.step for w in found])
        rest = [size[i] - whole.shape[2 + i] for i in range(2)]
        return aten.constant_pad_nd.default(whole, [0, rest[1], 0, rest[0]]) if any(rest) else whole
    rows, columns = found
    N, C, H, W = parts[0].shape
    (top, bottom), (left, right) = (w.padding(s) for w, s in zip(found, size, strict=True))
    padded = size[0] + top + bottom, size[1] + left + right
    total: Tensor | None = None
    taps = [(i, j) for i in range(rows.taps) for j in range(columns.taps)]
    for (i, j), part in zip(taps, parts, strict=True):
        stuffed = part.reshape(N * C, H, 1, W, 1)
        stuffed = aten.constant_pad_nd.default(stuffed, [0, columns.step - 1, 0, 0, 0, rows.step - 1])
        stuffed = stuffed.reshape(N, C, H * rows.step, W * columns.step)
        above, before = i * rows.spacing, j * columns.spacing
        # Zeros stuffed after the last position may reach beyond the padded image.
        kept = [min(stuffed.shape[2], padded[0] - above), min(stuffed.shape[3], padded[1] - before)]
        stuffed = stuffed[:, :, : kept[0], : kept[1]]
        placed = aten.constant_pad_nd.default(
            stuffed, [before, padded[1] - before - kept[1], above, padded[0] - above - kept[0]]
        )
        total = placed if total is None else total + placed
    assert total is not None
    return total[:, :, top : top + size[0], left : left + size[1]]

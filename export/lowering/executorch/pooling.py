"""Max pooling and its gradient without indices.

The kernel of ExecuTorch's wheels for the backward pass adds into memory that it never clears, so its gradients
are silently wrong; this one is made of maxima and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgetrain.export.graph.pooling import per_dimension
from edgetrain.export.lowering.executorch.decompositions import positive
from edgetrain.export.lowering.executorch.windows import Windows, interleave, taps

aten = torch.ops.aten

LOWEST = torch.finfo(torch.float32).min


def _windows(
    positions: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Windows, Windows]:
    kernel, padding, dilation = (per_dimension(values, 2) for values in (kernel_size, padding, dilation))
    stride = per_dimension(stride, 2) if stride else kernel
    rows, columns = (Windows(-padding[i], stride[i], dilation[i], kernel[i], positions[i]) for i in range(2))
    return rows, columns


def max_pool(
    x: Tensor,
    positions: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Tensor:
    """Maxima of windows: [N, H, W, C] -> [N, *positions, C]."""
    del ceil_mode  # `positions` says it
    first, *rest = taps(x, *_windows(positions, kernel_size, stride, padding, dilation), LOWEST)
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
    """Adds each gradient at the first maximum of its window, as torch does. Images [N, H, W, C]."""
    del ceil_mode
    found = _windows(grad.shape[1:3], kernel_size, stride, padding, dilation)
    seen = taps(x, *found, LOWEST)
    largest = seen[0]
    for tap in seen[1:]:
        largest = torch.maximum(largest, tap)
    left = grad
    parts = []
    for tap in seen:
        below = positive(largest - tap)
        rest = left * below
        parts.append(left - rest)
        left = rest
    return _spread(parts, found, x.shape[1:3])


def _spread(parts: Sequence[Tensor], found: Sequence[Windows], size: Sequence[int]) -> Tensor:
    """Adds every part at the input positions that its tap saw."""
    tiled = all(
        w.first == 0 and w.spacing == 1 and w.step == w.taps and w.positions * w.step <= s
        for w, s in zip(found, size, strict=True)
    )
    if tiled:
        whole = interleave(parts, [w.step for w in found])
        rest = [size[i] - whole.shape[1 + i] for i in range(2)]
        return aten.constant_pad_nd.default(whole, [0, 0, 0, rest[1], 0, rest[0]]) if any(rest) else whole
    rows, columns = found
    N, H, W, C = parts[0].shape
    (top, bottom), (left, right) = (w.padding(s) for w, s in zip(found, size, strict=True))
    whole_size = size[0] + top + bottom, size[1] + left + right
    total: Tensor | None = None
    places = [(i, j) for i in range(rows.taps) for j in range(columns.taps)]
    for (i, j), part in zip(places, parts, strict=True):
        stuffed = part.reshape(N * H, 1, W, 1, C)
        stuffed = aten.constant_pad_nd.default(stuffed, [0, 0, 0, columns.step - 1, 0, 0, 0, rows.step - 1])
        stuffed = stuffed.reshape(N, H * rows.step, W * columns.step, C)
        above, before = i * rows.spacing, j * columns.spacing
        # Zeros stuffed after the last position may reach beyond the padded image.
        kept = [min(stuffed.shape[1], whole_size[0] - above), min(stuffed.shape[2], whole_size[1] - before)]
        stuffed = stuffed[:, : kept[0], : kept[1]]
        below, after = whole_size[0] - above - kept[0], whole_size[1] - before - kept[1]
        placed = aten.constant_pad_nd.default(stuffed, [0, 0, before, after, above, below])
        total = placed if total is None else total + placed
    assert total is not None
    return total[:, top : top + size[0], left : left + size[1]]

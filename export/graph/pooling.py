"""Pooling, resizing and padding: backward passes that no runtime has.

All but the maximum are linear and separable, so the backward is a product with a small matrix per dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

aten = torch.ops.aten


def rules() -> dict[Any, Callable[..., Any]]:
    """The rules of this file, by operator."""
    table: dict[Any, Callable[..., Any]] = {
        aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),
        aten.max_pool3d_with_indices_backward.default: _max_pool_backward(3),
        aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
        aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool2d_backward,
        aten.avg_pool2d.default: _avg_pool2d,
        aten.avg_pool2d_backward.default: avg_pool_backward,
        aten.avg_pool3d_backward.default: avg_pool_backward,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool,  # noqa: SLF001
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool_backward,  # noqa: SLF001
        aten._adaptive_avg_pool3d.default: adaptive_avg_pool,  # noqa: SLF001
        aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool_backward,  # noqa: SLF001
        aten.replication_pad1d_backward.default: replication_pad_backward,
        aten.replication_pad2d_backward.default: replication_pad_backward,
        aten.replication_pad3d_backward.default: replication_pad_backward,
    }
    for kind in (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
        "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
        "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    ):  # fmt: skip
        forward, backward = getattr(aten, kind).default, getattr(aten, kind + "_backward").default
        table[backward] = _upsample_backward(forward)
    return table


def per_dimension(values: Sequence[int], rank: int) -> list[int]:
    """One value for each dimension; torch's operators take a single one for all."""
    return list(values) * rank if len(values) == 1 else list(values)


def _constant(matrix: list[list[float]]) -> Tensor:
    """A matrix that the trace takes as it is, without the operators that made it."""
    with disable_proxy_modes_tracing():
        return torch.tensor(matrix)


def along_last(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiplies the last dimensions of x by one matrix [in, out] each."""
    rank = len(matrices)
    for i, matrix in enumerate(matrices):
        dim = x.ndim - rank + i
        x = torch.matmul(x.transpose(dim, -1), matrix).transpose(dim, -1)
    return x


def _max_pool_backward(rank: int) -> Callable[..., Tensor]:
    def backward(grad: Tensor, x: Tensor, *options: Any) -> Tensor:
        """Adds each output gradient at the position of its maximum."""
        return _scatter_planes(grad, x.shape, options[-1], rank)

    return backward


def _adaptive_max_pool2d_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return _scatter_planes(grad, x.shape, indices, 2)


def _scatter_planes(grad: Tensor, shape: torch.Size, indices: Tensor, rank: int) -> Tensor:
    planes = list(shape[:-rank])
    flat = torch.zeros([*planes, shape[-rank:].numel()], dtype=grad.dtype)
    added = flat.scatter_add(-1, indices.reshape([*planes, -1]), grad.reshape([*planes, -1]))
    return added.reshape(shape)


def adaptive_max_pool2d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The maximum and its flat position for every window, window by window."""
    H, W = x.shape[-2:]
    values, positions = [], []
    for top, bottom in _windows(H, output_size[0]):
        for left, right in _windows(W, output_size[1]):
            width = right - left
            value, at = x[..., top:bottom, left:right].flatten(-2).max(-1)
            values.append(value)
            positions.append((top + torch.div(at, width, rounding_mode="floor")) * W + left + at % width)
    shape = [*x.shape[:-2], *output_size]
    return torch.stack(values, -1).reshape(shape), torch.stack(positions, -1).reshape(shape)


def _windows(size: int, out: int) -> list[tuple[int, int]]:
    return [(o * size // out, -(-(o + 1) * size // out)) for o in range(out)]


def _avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """ONNX's AveragePool has no divisor of its own; everything else is left to the runtime."""
    if divisor_override is None:
        return NotImplemented  # type: ignore[no-any-return]  # how a decomposition declines
    del count_include_pad
    with disable_proxy_modes_tracing():
        shape = aten.avg_pool2d(torch.zeros(x.shape), kernel_size, stride, padding, ceil_mode).shape
    matrices = _averaging_matrices(x.shape, shape, kernel_size, stride, padding, None)
    return along_last(x, [matrix.T for matrix in matrices]) / divisor_override


def avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """The transposed averaging, dimension by dimension."""
    del ceil_mode  # the shape of `grad` says it
    count = None if divisor_override else count_include_pad
    result = along_last(grad, _averaging_matrices(x.shape, grad.shape, kernel_size, stride, padding, count))
    return result / divisor_override if divisor_override else result


def _averaging_matrices(
    shape: torch.Size,
    out: torch.Size,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_pad: bool | None,
) -> list[Tensor]:
    """One matrix [out, in] for each dimension; `count_pad` None means sums instead of averages."""
    rank = len(kernel_size)
    kernel, padding = per_dimension(kernel_size, rank), per_dimension(padding, rank)
    stride = per_dimension(stride, rank) if stride else kernel
    matrices = []
    for k, s, p, size, steps in zip(kernel, stride, padding, shape[-rank:], out[-rank:], strict=True):
        matrix = [[0.0] * size for _ in range(steps)]
        for o in range(steps):
            start = o * s - p
            stop = min(start + k, size + p)
            inside = range(max(start, 0), min(stop, size))
            divisor = {None: 1, True: stop - start, False: len(inside)}[count_pad]
            for i in inside:
                matrix[o][i] = 1.0 / divisor
        matrices.append(_constant(matrix))
    return matrices


def adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Averages of windows whose sizes may differ: a mean, or a product with a matrix per dimension."""
    rank = len(output_size)
    if all(size == 1 for size in output_size):
        return x.mean(list(range(-rank, 0)), keepdim=True)
    return along_last(x, [m.T for m in _adaptive_matrices(x.shape[-rank:], output_size)])


def adaptive_avg_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of `adaptive_avg_pool`."""
    rank = x.ndim - 2 if x.ndim > 3 else x.ndim - 1
    out, size = grad.shape[-rank:], x.shape[-rank:]
    if out.numel() == 1:
        return (grad / size.numel()).expand(x.shape)
    return along_last(grad, _adaptive_matrices(size, out))


def _adaptive_matrices(sizes: Sequence[int], outs: Sequence[int]) -> list[Tensor]:
    matrices = []
    for size, out in zip(sizes, outs, strict=True):
        matrix = [[0.0] * size for _ in range(out)]
        for o, (start, stop) in enumerate(_windows(size, out)):
            for i in range(start, stop):
                matrix[o][i] = 1.0 / (stop - start)
        matrices.append(_constant(matrix))
    return matrices


def replication_pad_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """Each border element gathers the gradients of its copies."""
    rank = len(padding) // 2
    matrices = []
    for i, size in enumerate(x.shape[-rank:]):
        before, after = padding[2 * (rank - 1 - i) : 2 * (rank - i)]
        matrix = [[0.0] * size for _ in range(before + size + after)]
        for o, row in enumerate(matrix):
            row[min(max(o - before, 0), size - 1)] = 1.0
        matrices.append(_constant(matrix))
    return along_last(grad, matrices)


def _upsample_backward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def backward(grad: Tensor, output_size: Sequence[int], input_size: Sequence[int], *options: Any) -> Tensor:
        """Products with the resizing matrices, which the forward operator itself yields from unit vectors."""
        rank = len(output_size)
        # With align_corners or cubic first, then one scale per dimension.
        flags, scales = options[: len(options) - rank], options[len(options) - rank :]
        if len(options) < rank or any(isinstance(scale, bool) for scale in scales):
            flags, scales = options, (None,) * rank
        matrices = []
        for i, (size, out, scale) in enumerate(zip(input_size[-rank:], output_size, scales, strict=True)):
            others = [1] * rank
            others[i] = size
            outs = [1] * rank
            outs[i] = out
            factors = [scale if j == i else None for j in range(rank)]
            with disable_proxy_modes_tracing():
                units = torch.eye(size).reshape(size, 1, *others)
                matrices.append(forward(units, outs, *flags, *factors).reshape(size, out).T.contiguous())
        return along_last(grad, matrices)

    return backward

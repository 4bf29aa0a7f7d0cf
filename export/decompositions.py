"""Operators as simpler ones, where torch has no decomposition or one that no runtime can run.

`common()` is what every lowering starts from; a lowering adds or takes away what its backend needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten

Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]  # noqa: SLF001


def common() -> Decompositions:
    """Core ATen, and our own rules for the backward passes that it leaves whole."""
    table: Decompositions = dict(core_aten_decompositions())  # type: ignore[arg-type]
    table |= dict(get_decompositions([aten.convolution_overrideable]))  # type: ignore[arg-type]
    table |= {
        aten.convolution_backward.default: convolution_backward,
        aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
        aten.avg_pool2d_backward.default: avg_pool2d_backward,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,  # noqa: SLF001
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,  # noqa: SLF001
    }
    return table


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution of any rank, by its input, its weight and its bias.

    By the input: the transposed convolution (and the other way round). By the weight: one matrix product per
    kernel tap, of the output gradient with the input shifted to that tap.
    """
    rank = x.ndim - 2
    stride, padding, dilation = (_per_dimension(v, rank) for v in (stride, padding, dilation))
    grad_x = grad_w = grad_b = None
    if output_mask[0] and transposed:
        grad_x = aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * rank, groups)
    elif output_mask[0]:
        kernel = weight.shape[2:]
        reached = [
            (grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1
            for i in range(rank)
        ]
        rest = [x.shape[2 + i] - reached[i] for i in range(rank)]
        grad_x = aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)
    if output_mask[1]:
        small, large = (x, grad) if transposed else (grad, x)
        grad_w = _weight_gradient(small, large, weight.shape, stride, padding, dilation, groups)
    if output_mask[2]:
        grad_b = grad.sum([0, *range(2, grad.ndim)])
    return grad_x, grad_w, grad_b


def _per_dimension(values: Sequence[int], rank: int) -> list[int]:
    return list(values) * rank if len(values) == 1 else list(values)


def _weight_gradient(
    small: Tensor,
    large: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dW[o, i, tap] = sum over batch and positions of small[o, position] * large[i, position*stride + tap].

    small: [N, O, *positions]; large: [N, I, *]; shape: [O, I/groups, *kernel]; result: `shape`.
    """
    rank = len(stride)
    N, G = small.shape[0], groups
    O, I = shape[0] // G, shape[1]
    positions = small.shape[2:]
    P = positions.numel()
    kernel = list(shape[2:])
    if any(padding):
        large = torch.constant_pad_nd(large, [p for size in reversed(padding) for p in (size, size)])
    taps = []
    for tap in _indices(kernel):
        view = large
        for i in range(rank):
            start = tap[i] * dilation[i]
            stop = start + (positions[i] - 1) * stride[i] + 1
            view = aten.slice.Tensor(view, 2 + i, start, stop, stride[i])
        taps.append(view)
    if I == 1 and O == 1:
        # Depthwise: a product per channel, no matrix.
        dims = [0, *range(2, 2 + rank)]
        return torch.stack([(small * tap).sum(dims) for tap in taps], -1).view(shape)
    # [G, O, N*P] @ [G, N*P, I], one product per tap.
    left = small.reshape(N, G, O, P).permute(1, 2, 0, 3).reshape(G, O, N * P)
    products = [
        torch.bmm(left, tap.reshape(N, G, I, P).permute(1, 0, 3, 2).reshape(G, N * P, I)) for tap in taps
    ]
    stacked = products[0].unsqueeze(-1) if len(products) == 1 else torch.stack(products, -1)
    return stacked.reshape(shape)


def _indices(sizes: Sequence[int]) -> list[list[int]]:
    indices: list[list[int]] = [[]]
    for size in sizes:
        indices = [[*index, i] for index in indices for i in range(size)]
    return indices


def max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Adds each output gradient at the position of its maximum."""
    del kernel_size, stride, padding, dilation, ceil_mode
    planes = x.shape[:-2]
    flat = torch.zeros([*planes, x.shape[-2] * x.shape[-1]], dtype=grad.dtype)
    added = flat.scatter_add(-1, indices.reshape([*planes, -1]), grad.reshape([*planes, -1]))
    return added.reshape(x.shape)


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Average pooling is linear and separable: two products with the transposed averaging matrices."""
    del ceil_mode  # the shape of `grad` says it
    kernel, padding = _per_dimension(kernel_size, 2), _per_dimension(padding, 2)
    stride = _per_dimension(stride, 2) if stride else kernel
    rows, columns = (
        _averaging(
            x.shape[i - 2],
            grad.shape[i - 2],
            kernel[i],
            stride[i],
            padding[i],
            count_include_pad,
            divisor_override is not None,
        )
        for i in range(2)
    )
    result = torch.matmul(torch.matmul(rows.T, grad), columns)
    return result / divisor_override if divisor_override else result


def _averaging(
    size: int, out: int, kernel: int, stride: int, padding: int, count_pad: bool, plain_sum: bool
) -> Tensor:
    """The matrix [out, size] that averages windows along one dimension."""
    matrix = [[0.0] * size for _ in range(out)]
    for o in range(out):
        start = o * stride - padding
        stop = min(start + kernel, size + padding)
        inside = range(max(start, 0), min(stop, size))
        divisor = 1 if plain_sum else (stop - start if count_pad else len(inside))
        for i in inside:
            matrix[o][i] = 1.0 / divisor
    return torch.tensor(matrix)


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Averages of windows whose sizes may differ: mean, or two products with averaging matrices."""
    if list(output_size) == [1, 1]:
        return x.mean([-2, -1], keepdim=True)
    rows, columns = (_adaptive_averaging(x.shape[i - 2], output_size[i]) for i in range(2))
    return torch.matmul(torch.matmul(rows, x), columns.T)


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of `adaptive_avg_pool2d`."""
    if list(grad.shape[-2:]) == [1, 1]:
        return (grad / (x.shape[-1] * x.shape[-2])).expand(x.shape)
    rows, columns = (_adaptive_averaging(x.shape[i - 2], grad.shape[i - 2]) for i in range(2))
    return torch.matmul(torch.matmul(rows.T, grad), columns)


def _adaptive_averaging(size: int, out: int) -> Tensor:
    matrix = [[0.0] * size for _ in range(out)]
    for o in range(out):
        start, stop = o * size // out, -(-(o + 1) * size // out)
        for i in range(start, stop):
            matrix[o][i] = 1.0 / (stop - start)
    return torch.tensor(matrix)

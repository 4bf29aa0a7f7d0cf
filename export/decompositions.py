"""Operators as simpler ones, where torch has no decomposition or one that no runtime can run.

`common()` is what every lowering starts from; a lowering adds or takes away what its backend needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

from edgetrain.export import pooling
from edgetrain.export.pooling import per_dimension

aten = torch.ops.aten

Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]  # noqa: SLF001


def common() -> Decompositions:
    """Core ATen, and our own rules for the backward passes that it leaves whole."""
    table: Decompositions = dict(core_aten_decompositions())
    for name in ("dim_int", "default"):
        table.pop(getattr(aten.prod, name), None)  # its decomposition ends in a primitive that nobody knows
    return table | {
        aten.convolution_backward.default: convolution_backward,
        aten.hardshrink_backward.default: hardshrink_backward,
        aten.softshrink_backward.default: hardshrink_backward,
        aten._weight_norm_interface_backward.default: weight_norm_backward,  # noqa: SLF001
        aten.empty_permuted.default: empty_permuted,
        **pooling.rules(),
    }


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
    stride, padding, dilation = (per_dimension(v, rank) for v in (stride, padding, dilation))
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


def empty_permuted(size: Sequence[int], _order: Sequence[int], **options: Any) -> Tensor:
    """Memory formats mean nothing to a runtime."""
    return torch.zeros(size, dtype=options.get("dtype"))


def hardshrink_backward(grad: Tensor, x: Tensor, lambd: float) -> Tensor:
    """Also of softshrink: the gradient passes where |x| > lambda."""
    return torch.where(x.abs() > lambd, grad, torch.zeros_like(grad))


def weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Salimans and Kingma 2016, equation 3: gradients by the direction v and the length g."""
    dims = [d for d in range(v.ndim) if d != dim]
    norms = norms.reshape(g.shape)
    grad_g = (grad * v).sum(dims, keepdim=True) / norms
    return g / norms * (grad - v * (grad_g / norms)), grad_g

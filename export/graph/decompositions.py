"""Operators as simpler ones, where torch has no decomposition or one that no runtime can run.

`common()` is what every lowering starts from; a lowering adds or takes away what its backend needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from edgetrain.export.graph import pooling
from edgetrain.export.graph.pooling import per_dimension

aten = torch.ops.aten

# Replacements of operators by simpler ones, as `make_fx` takes them.
Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]  # noqa: SLF001


def common() -> Decompositions:
    """Core ATen, and our own rules for the backward passes that it leaves whole."""
    table: Decompositions = dict(core_aten_decompositions())
    for name in ("dim_int", "default"):
        table.pop(getattr(aten.prod, name), None)  # its decomposition ends in a primitive that nobody knows
    # In a table it asks for the form of `before_autograd`: left to each lowering.
    table.pop(aten.scaled_dot_product_attention.default, None)
    return table | {
        aten.convolution_backward.default: convolution_backward,
        aten.hardshrink_backward.default: hardshrink_backward,
        aten.native_layer_norm_backward.default: layer_norm_backward,
        aten.softshrink_backward.default: hardshrink_backward,
        aten._weight_norm_interface_backward.default: weight_norm_backward,  # noqa: SLF001
        aten.as_strided.default: as_strided,
        aten.as_strided_scatter.default: as_strided_scatter,
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

    By the input: the transposed convolution (and the other way round). By the weight: one matrix product of
    the output gradient with the input shifted to each kernel tap.
    """
    del bias_sizes, output_padding  # the shapes say it
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
    shape: torch.Size,
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
    n_out, n_in = shape[0] // G, shape[1]
    if rank == 2 and shape[2:].numel() > 1 and (G == 1 or n_out == n_in == 1):
        return _image_weight_gradient(small, large, shape, stride, padding, dilation, groups)
    positions = small.shape[2:]
    P = positions.numel()
    kernel = list(shape[2:])
    if any(padding):
        large = torch.constant_pad_nd(large, [p for size in reversed(padding) for p in (size, size)])
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        view = large
        for i in range(rank):
            start = tap[i] * dilation[i]
            stop = start + (positions[i] - 1) * stride[i] + 1
            if (start, stop, stride[i]) != (0, view.shape[2 + i], 1):
                view = aten.slice.Tensor(view, 2 + i, start, stop, stride[i])
        taps.append(view)
    columns = taps[0] if len(taps) == 1 else torch.stack(taps, 2)
    K = len(taps)
    if G == 1 and _transposing_pays(N, P, n_out, n_in * K):
        left = small.reshape(N, n_out, P).transpose(0, 1).reshape(n_out, N * P)
        right = columns.reshape(N, n_in * K, P).transpose(0, 1).reshape(n_in * K, N * P)
        return torch.mm(left, right.T).reshape(shape)
    left, right = small.reshape(N, G, n_out, P), columns.reshape(N, G, n_in * K, P)
    return torch.matmul(left, right.transpose(-1, -2)).sum(0).reshape(shape)


def _image_weight_gradient(
    small: Tensor,
    large: Tensor,
    shape: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The same for images, dense or depthwise, with a tap's shift as one cut of whole flattened images.

    A window of an image is many short rows to copy. With the output gradient padded to the image's width, by zeros, it
    is one piece of the flattened image; with a stride, of one of the images that every second (third, …) pixel gives.
    """
    N, O = small.shape[:2]
    I = large.shape[1]
    rows, columns = small.shape[2:]
    reach = [dilation[i] * (shape[2 + i] - 1) // stride[i] for i in (0, 1)]
    width = columns + reach[1]
    # One row more than the windows need: the last cut may begin in the middle of a row.
    height = rows + reach[0] + 1
    below, right = (size * stride[i] - large.shape[2 + i] - padding[i] for i, size in enumerate((height, width)))
    padded = torch.constant_pad_nd(large, [padding[1], right, padding[0], below])
    length = rows * width
    left = torch.constant_pad_nd(small, [0, width - columns, 0, 0]).reshape(N, O, length)
    images: dict[tuple[int, int], Tensor] = {}
    taps = []
    for tap in itertools.product(*map(range, shape[2:])):
        (down, y), (across, x) = (divmod(tap[i] * dilation[i], stride[i]) for i in (0, 1))
        if (y, x) not in images:
            phase = padded
            for i, first in enumerate((y, x)):
                if stride[i] > 1:
                    phase = aten.slice.Tensor(phase, 2 + i, first, None, stride[i])
            images[y, x] = phase.reshape(N, I, height * width)
        start = down * width + across
        right_NIL = aten.slice.Tensor(images[y, x], 2, start, start + length)
        if groups == 1:
            taps.append(torch.matmul(left, right_NIL.transpose(1, 2)))
        else:
            taps.append((left * right_NIL).sum([0, 2]))
    if groups == 1:
        return torch.stack(taps, -1).sum(0).reshape(shape)
    return torch.stack(taps, -1).reshape(shape)


def _transposing_pays(N: int, P: int, rows: int, columns: int) -> bool:
    """Whether one large product with the batch moved inside is less traffic than N products and their sum."""
    return N > 1 and P * (rows + columns) < rows * columns


def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """Elements by their position in a contiguous tensor."""
    return x.reshape(-1)[_positions(size, stride, storage_offset or 0)].reshape(size)


def as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """Writes to positions in a contiguous tensor: the backward of in-place writes to views."""
    positions = _positions(size, stride, storage_offset or 0)
    if source.numel() == x.numel():
        with disable_proxy_modes_tracing():
            whole = torch.equal(positions, torch.arange(x.numel()))
        if whole:
            return source.reshape(x.shape)
    return x.reshape(-1).scatter(0, positions, source.reshape(-1)).reshape(x.shape)


def _positions(size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    with disable_proxy_modes_tracing():
        positions = torch.tensor(offset)
        for n, step in zip(size, stride, strict=True):
            positions = positions.unsqueeze(-1) + torch.arange(n) * step
        return positions.flatten()


def empty_permuted(size: Sequence[int], _order: Sequence[int], **options: Any) -> Tensor:
    """Memory formats mean nothing to a runtime."""
    return torch.zeros(size, dtype=options.get("dtype"))


def hardshrink_backward(grad: Tensor, x: Tensor, lambd: float) -> Tensor:
    """Also of softshrink: the gradient passes where |x| > lambda."""
    return torch.where(x.abs() > lambd, grad, torch.zeros_like(grad))


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Ba et al. 2016, with sums over rows and columns as products with vectors, and few sweeps over x."""
    del bias
    D = math.prod(shape)
    grad_ND, x_ND = grad.reshape(-1, D), x.reshape(-1, D)
    mean_N1, rstd_N1 = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    centred = x_ND - mean_N1
    product = grad_ND * centred
    by_x = by_weight = by_bias = None
    if mask[0]:
        # Divided here and not in the means: with columns, and factors within products, onnxruntime is slow.
        shares = (torch.ones(D, dtype=grad.dtype) if weight is None else weight.reshape(D)) * (1 / D)
        column = shares.reshape(D, 1)
        scaled = grad_ND if weight is None else grad_ND * weight.reshape(1, D)
        slope = torch.mm(product, column) * rstd_N1 * rstd_N1
        by_x = (((scaled - torch.mm(grad_ND, column)) - centred * slope) * rstd_N1).reshape(x.shape)
    if mask[1]:
        by_weight = torch.mm(rstd_N1.reshape(1, -1), product).reshape(shape)
    if mask[2]:
        by_bias = grad_ND.sum(0).reshape(shape)
    return by_x, by_weight, by_bias


def weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Salimans and Kingma 2016, equation 3: gradients by the direction v and the length g."""
    dims = [d for d in range(v.ndim) if d != dim]
    norms = norms.reshape(g.shape)
    grad_g = (grad * v).sum(dims, keepdim=True) / norms
    return g / norms * (grad - v * (grad_g / norms)), grad_g

"""Which form each convolution, pooling and gradient of them takes, by what is frozen in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph.pooling import per_dimension
from edgetrain.export.lowering.executorch import convolution as conv
from edgetrain.export.lowering.executorch.layout import from_last, to_last
from edgetrain.export.lowering.executorch.pooling import max_pool as max_pool_form
from edgetrain.export.lowering.executorch.pooling import max_pool_backward as max_pool_backward_form
from edgetrain.export.lowering.executorch.reductions import sum_

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter

aten = torch.ops.aten


def _pair(values: Sequence[int], rank: int, missing: int) -> tuple[int, ...]:
    """Settings of a 1-d or 2-d convolution as rows, columns."""
    values = per_dimension(values, rank)
    return (missing, *values) if rank == 1 else tuple(values)


def _image(x: Tensor) -> Tensor:
    """[N, C, L] as [N, C, 1, L]."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], 1, x.shape[-1])


def _geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> conv.Geometry:
    rank = weight.ndim - 2
    return conv.Geometry(
        kernel=tuple(_image(weight).shape[2:]),
        stride=_pair(stride, rank, 1),
        padding=_pair(padding, rank, 0),
        dilation=_pair(dilation, rank, 1),
        groups=groups,
    )


def convolution(
    rewriter: Rewriter,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """As it is with constant weights, which XNNPACK packs; else a product."""
    if weight.ndim > 4:
        return NotImplemented
    if rewriter.is_static(1):
        if rewriter.is_static(2):
            return NotImplemented
        y = aten.convolution.default(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
        return y if bias is None else y + bias.reshape(1, -1, *[1] * (y.ndim - 2))
    geometry = _geometry(weight, stride, padding, dilation, groups)
    shape = rewriter.shape()
    image = _last(rewriter, 0, x)
    if transposed:
        y = conv.input_gradient(image, _image(weight), geometry, _image_size(shape))
    else:
        y = conv.convolution(image, _image(weight), geometry)
    if bias is not None:
        y = y + bias
    return rewriter.image(y) if len(shape) == 4 else from_last(y).reshape(shape)


def _last(rewriter: Rewriter, index: int, x: Tensor) -> Tensor:
    """An argument of the current call as an image, channels-last."""
    return rewriter.last(index) if x.ndim == 4 else to_last(_image(x))


def _image_size(shape: Sequence[int]) -> Sequence[int]:
    return shape[2:] if len(shape) == 4 else (1, shape[2])


def convolution_backward(
    rewriter: Rewriter,
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
) -> Any:
    """Three gradients, each only if asked for."""
    del bias_sizes, output_padding
    if weight.ndim > 4:
        raise UnsupportedError(
            "executorch: no gradient of a three-dimensional convolution; freeze it and what comes before it"
        )
    geometry = _geometry(weight, stride, padding, dilation, groups)
    frozen = rewriter.is_static(2)
    grad_x = grad_w = grad_b = None
    by_input, by_weight = bool(output_mask[0]), bool(output_mask[1])
    if by_input and frozen:
        given = _image(grad)
        grad_x = (
            _constant_convolution(rewriter, given, weight, geometry, geometry.padding, geometry.stride)
            if transposed
            else _input_gradient(rewriter, given, weight, geometry, _image(x).shape[2:])
        ).reshape(x.shape)
        by_input = False
    if by_input or by_weight:
        images = _last(rewriter, 1, x), _last(rewriter, 0, grad)
        if transposed:
            found = conv.convolution(images[1], _image(weight), geometry) if by_input else None
            grad_w = conv.weight_gradient(*images[::-1], geometry) if by_weight else None
        else:
            found, grad_w = conv.gradients(*images, _image(weight), geometry, by_input=by_input, by_weight=by_weight)
        if found is not None:
            grad_x = rewriter.image(found, 0) if x.ndim == 4 else from_last(found).reshape(x.shape)
        if grad_w is not None:
            grad_w = grad_w.reshape(weight.shape)
    if output_mask[2]:
        dims = [0, *range(2, grad.ndim)]
        grad_b = sum_(rewriter, grad, dims)
        if grad_b is NotImplemented:
            grad_b = grad.sum(dims)
    return grad_x, grad_w, grad_b


def _constant_convolution(
    rewriter: Rewriter,
    x: Tensor,
    weight: Tensor,
    geometry: conv.Geometry,
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    weight = rewriter.now(lambda: _image(weight))
    result: Tensor = aten.convolution.default(
        x, weight, None, list(stride), list(padding), list(geometry.dilation), False, [0, 0], geometry.groups
    )
    return result


def _input_gradient(
    rewriter: Rewriter, grad: Tensor, weight: Tensor, geometry: conv.Geometry, size: Sequence[int]
) -> Tensor:
    """With constant weights XNNPACK convolves: forwards at stride 1, else transposed.

    Transposed, channel by channel, takes it a millisecond for every call, however small: zeros are put in between
    instead, where as many are wanted on both sides.
    """
    padding = [geometry.dilation[i] * (geometry.kernel[i] - 1) - geometry.padding[i] for i in range(2)]
    # Rows and columns that no window reached.
    rest = [
        size[i]
        - (
            (grad.shape[2 + i] - 1) * geometry.stride[i]
            + geometry.dilation[i] * (geometry.kernel[i] - 1)
            + 1
            - 2 * geometry.padding[i]
        )
        for i in range(2)
    ]
    even = geometry.depthwise(_image(weight)) and rest == [step - 1 for step in geometry.stride]
    forwards = geometry.stride == (1, 1) or even
    if forwards and min(padding) >= 0:
        mirrored = rewriter.now(lambda: _mirror(_image(weight), geometry.groups))
        return _constant_convolution(
            rewriter, _spread(rewriter, grad, geometry.stride), mirrored, geometry, padding, (1, 1)
        )
    result: Tensor = aten.convolution.default(
        grad,
        rewriter.now(lambda: _image(weight)),
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        True,
        rest,
        geometry.groups,
    )
    return result


def _spread(rewriter: Rewriter, image: Tensor, stride: Sequence[int]) -> Tensor:
    """[N, C, H, W] with zeros behind every row and every column: [N, C, H*stride, W*stride]."""
    if tuple(stride) == (1, 1):
        return image
    N, C, H, W = image.shape
    rows, columns = stride
    # Columns by a product, since XNNPACK pads element by element there.
    wide = image.reshape(N * C * H, W) @ rewriter.constant(_apart, W, columns)
    tall: Tensor = aten.constant_pad_nd.default(wide, [0, (rows - 1) * W * columns])
    return tall.reshape(N, C, H * rows, W * columns)


def _apart(size: int, stride: int) -> Tensor:
    """Ones where position p goes to p * stride: [size, size*stride]."""
    return torch.eye(size * stride)[::stride]


def _mirror(weight: Tensor, groups: int) -> Tensor:
    """Weights of the convolution that is the transpose: [G*O, I, kh, kw] -> [G*I, O, kh, kw], turned around."""
    O, I, *kernel = weight.shape
    grouped = weight.reshape(groups, O // groups, I, *kernel).transpose(1, 2)
    return grouped.reshape(groups * I, O // groups, *kernel).flip(-1, -2)


def max_pool(rewriter: Rewriter, x: Tensor, *settings: Any) -> Any:
    """The indices are kept only if somebody other than the backward pass reads them."""
    backward = aten.max_pool2d_with_indices_backward.default
    for user in rewriter.node.users:
        if user.args[1] == 1 and any(reader.target != backward for reader in user.users):
            return NotImplemented
    if x.ndim != 4:
        return NotImplemented
    return rewriter.image(max_pool_form(rewriter.last(0), rewriter.shape()[2:], *settings), 0), None


def max_pool_backward(rewriter: Rewriter, grad: Tensor, x: Tensor, *settings: Any) -> Any:
    """Without indices, and right."""
    if x.ndim == 4:
        return rewriter.image(max_pool_backward_form(rewriter.last(0), rewriter.last(1), *settings[:-1]))
    one_grad, one = (to_last(t.reshape(1, *t.shape)) for t in (grad, x))
    return from_last(max_pool_backward_form(one_grad, one, *settings[:-1])).reshape(x.shape)

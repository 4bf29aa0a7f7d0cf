"""Operators in the forms that onnxruntime is fastest with: fewer sweeps over memory, products instead of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetrain.export.graph.before_autograd import COMPOSITES
from edgetrain.export.graph.decompositions import Decompositions, common
from edgetrain.export.graph.decompositions import convolution_backward as common_convolution_backward
from edgetrain.export.lowering.onnx.convolution import convolution, gradients
from edgetrain.export.lowering.onnx.convolution_form import choose

aten = torch.ops.aten


def for_onnx() -> Decompositions:
    """`common()`, and forms that onnxruntime is faster with."""
    return (
        common()
        | COMPOSITES
        | {
            aten.convolution.default: convolution,
            aten.convolution_backward.default: convolution_backward,
            aten.gelu.default: gelu,
            aten.gelu_backward.default: gelu_backward,
            aten._safe_softmax.default: safe_softmax,  # noqa: SLF001
            aten.hardtanh_backward.default: hardtanh_backward,
            aten.squeeze.dims: squeeze,
            aten.threshold_backward.default: threshold_backward,
        }
    )


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *options: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the common one, with products in the forms of `convolution` where there is one."""
    stride, padding, dilation, transposed, _, groups, output_mask = options
    form = choose(x, weight, stride, padding, dilation, transposed, groups)
    grad_x = grad_w = None
    if form is not None:
        grad_x, grad_w = gradients(grad, x, weight, form, output_mask)
    rest = [output_mask[0] and grad_x is None, output_mask[1] and grad_w is None, output_mask[2]]
    other = common_convolution_backward(grad, x, weight, bias_sizes, *(*options[:-1], rest))
    return (other[0] if grad_x is None else grad_x, other[1] if grad_w is None else grad_w, other[2])


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """In tanh form x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): five operators, which the backward shares."""
    if approximate != "tanh":
        return x * _normal_distribution(x)
    return x * _gate(x)


def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gradient of `gelu`, of what it has computed already."""
    if approximate != "tanh":
        density: Tensor = torch.exp(x * x * -0.5) * (2 * math.pi) ** -0.5
        return grad * (_normal_distribution(x) + x * density)
    gate = _gate(x)
    y = x * gate
    slope = x * x * (3 * GELU_CUBIC) + GELU_LINEAR
    return grad * (gate + (y - y * gate) * slope)


# 2u = GELU_LINEAR x + GELU_CUBIC x^3
GELU_LINEAR: float = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


def _gate(x: Tensor) -> Tensor:
    return torch.sigmoid(x * (x * x * GELU_CUBIC + GELU_LINEAR))


def _normal_distribution(x: Tensor) -> Tensor:
    return torch.erf(x * 0.5**0.5) * 0.5 + 0.5


def squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    """A shape is what ONNX has for it anyway."""
    gone = {dim % x.ndim for dim in dims if x.shape[dim] == 1}
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in gone])


def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros where everything is masked, which the row's largest value tells in one pass."""
    x = x if dtype is None else x.to(dtype)
    masked = torch.amax(x, dim, keepdim=True) == -math.inf
    return torch.where(masked, torch.zeros((), dtype=x.dtype), torch.softmax(x, dim))


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Of ReLU above all. A product with ones and zeros takes half the time of a choice."""
    return grad * (x > threshold).to(grad.dtype)


def hardtanh_backward(grad: Tensor, x: Tensor, min_val: float, max_val: float) -> Tensor:
    """Of ReLU6 above all; see `threshold_backward`."""
    return grad * ((x > min_val) & (x < max_val)).to(grad.dtype)

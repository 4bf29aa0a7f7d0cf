"""Operators as others that XNNPACK runs, for the ExecuTorch lowering.

XNNPACK has no comparison, no selection, no sum and no gather: masks are arithmetic here, picked classes are
rows of a table, and sums are left to `reductions`, which knows how to reduce by a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of `kept_as_bytes`
from torch import Tensor

from edgetrain.export.graph.before_autograd import COMPOSITES
from edgetrain.export.graph.decompositions import Decompositions, common

aten = torch.ops.aten

# Times this, every normal positive float32 is at least 1: what makes a step function of a clamp.
STEEP = 3e38
# Scale, zero point, range and type of numbers in int8 that stay what they are.
AS_THEY_ARE = (1.0, 0, -128, 127, torch.int8)
# Classes up to which a one-hot row is looked up in an identity matrix (1 MiB at most).
MAX_ONE_HOT = 512
# Left whole by the trace: the rewriter decides by what is frozen.
_KEPT = (
    aten._safe_softmax.default,  # noqa: SLF001
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,  # noqa: SLF001
)
_Operator = torch._ops.OpOverload  # noqa: SLF001


def decompositions() -> Decompositions:
    """Core ATen with our own forms in place of what XNNPACK lacks."""
    table = common()
    for operator in _KEPT:
        table.pop(operator, None)
    # Batch norms are not folded into convolutions that learn: more activations would come to lie on the kink of a relu.
    attention = aten.scaled_dot_product_attention.default
    table[attention] = COMPOSITES[attention]
    table |= {
        aten._log_softmax.default: log_softmax,  # noqa: SLF001
        aten._log_softmax_backward_data.default: log_softmax_backward,  # noqa: SLF001
        aten._softmax_backward_data.default: softmax_backward,  # noqa: SLF001
        aten.embedding_dense_backward.default: _unless_large(embedding_backward, aten.embedding_dense_backward.default),
        aten.gelu.default: gelu,
        aten.gelu_backward.default: gelu_backward,
        aten.hardtanh_backward.default: hardtanh_backward,
        aten.leaky_relu_backward.default: leaky_relu_backward,
        aten.native_group_norm.default: group_norm,
        aten.native_layer_norm.default: layer_norm,
        aten.nll_loss_backward.default: _unless_large(nll_loss_backward, aten.nll_loss_backward.default),
        aten.nll_loss_forward.default: _unless_large(nll_loss, aten.nll_loss_forward.default),
        aten.threshold_backward.default: threshold_backward,
    }
    return table


def _unless_large(form: Callable[..., Any], operator: _Operator) -> Callable[..., Any]:
    """`form`, or torch's own decomposition where `form` declines with None."""
    usual = common()[operator]

    def choose(*args: Any, **kwargs: Any) -> Any:
        result = form(*args, **kwargs)
        return usual(*args, **kwargs) if result is None else result

    return choose


def positive(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, as float32."""
    ones: Tensor = aten.clamp.default(x * STEEP, 0.0, 1.0)
    return ones


def kept_as_bytes(ones: Tensor) -> Tensor:
    """The same zeros and ones, by way of int8: so they wait in a quarter of the memory, if they wait at all.

    Where weights are frozen, the backward pass needs of a relu not the activation but where it was positive. XNNPACK's
    conversions are exact for that. Where nothing waits, they are left out again; see `peephole`.
    """
    quantized = torch.ops.quantized_decomposed
    as_bytes = quantized.quantize_per_tensor.default(ones, *AS_THEY_ARE)
    kept: Tensor = quantized.dequantize_per_tensor.default(as_bytes, *AS_THEY_ARE)
    return kept


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Of relu: the gradient where x exceeds the threshold."""
    return grad * kept_as_bytes(positive(x - threshold if threshold else x))


def hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Of hardtanh and relu6: the gradient strictly between the bounds."""
    return grad * kept_as_bytes(positive(torch.minimum(x - low if low else x, high - x)))


def leaky_relu_backward(grad: Tensor, x: Tensor, slope: float, is_result: bool) -> Tensor:
    """The gradient, times the slope where x is not positive."""
    del is_result  # the result has the sign of x
    return grad * (kept_as_bytes(positive(x)) * (1 - slope) + slope)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """X - max - log sum exp."""
    del half_to_float
    shifted = x - x.amax(dim, keepdim=True)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Grad - softmax * sum(grad)."""
    del dtype
    return grad - output.exp() * grad.sum(dim, keepdim=True)


def softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Output * (grad - sum(output * grad))."""
    del dtype
    product = grad * output
    return product - output * product.sum(dim, keepdim=True)


def one_hot(indices: Tensor, classes: int) -> Tensor:
    """Float rows of the identity: [*] -> [*, classes]. An index outside stops the program."""
    rows: Tensor = aten.embedding.default(torch.eye(classes), indices)
    return rows


def _valid(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """1 where the target counts, as float; and the targets with 0 for those that do not."""
    keep = target != ignore_index
    return keep.to(torch.float32), torch.where(keep, target, 0)


def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor] | None:
    """Of log-probabilities [R, C] without reduction: minus the target's."""
    if x.ndim != 2 or weight is not None or reduction != 0 or x.shape[1] > MAX_ONE_HOT:
        return None
    valid, target = _valid(target, ignore_index)
    picked = (one_hot(target, x.shape[1]) * x).sum(1)
    return -(picked * valid), torch.zeros(())


def nll_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor | None:
    """Minus the gradient at the target."""
    del total_weight
    if x.ndim != 2 or weight is not None or reduction != 0 or x.shape[1] > MAX_ONE_HOT:
        return None
    valid, target = _valid(target, ignore_index)
    return one_hot(target, x.shape[1]) * -(grad * valid).unsqueeze(-1)


def embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor | None:
    """One product with the one-hot indices."""
    if num_weights > MAX_ONE_HOT or scale_grad_by_freq:
        return None
    rows = one_hot(indices.reshape(-1), num_weights)
    if padding_idx >= 0:
        table = torch.ones(num_weights)
        table[padding_idx] = 0
        rows = rows * table
    return torch.mm(rows.t(), grad.reshape(-1, grad.shape[-1]))


def gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """XNNPACK's own kernel is the exact form, whatever `approximate` says: the tanh form is spelled out."""
    if approximate == "none":
        return NotImplemented
    return x * torch.sigmoid(_gelu_argument(x)[0])


def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """The derivative without erf, which XNNPACK lacks."""
    if approximate == "none":
        density = torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return grad * (_normal_cdf(x) + x * density)
    argument, slope = _gelu_argument(x)
    gate = torch.sigmoid(argument)
    # The forward pass has the first product.
    return grad * (gate + x * gate * (slope * (1 - gate)))


def _gelu_argument(x: Tensor) -> tuple[Tensor, Tensor]:
    """2u and its derivative, where the tanh form is x * (1 + tanh u) / 2 = x * sigmoid(2u)."""
    factor = 2 * math.sqrt(2 / math.pi)
    square = x * x
    return x * (square * (0.044715 * factor) + factor), square * (3 * 0.044715 * factor) + factor


def _normal_cdf(x: Tensor) -> Tensor:
    """The normal distribution function to 1.5e-7: Abramowitz & Stegun 1964, formula 7.1.26."""
    z = torch.abs(x) * (1 / math.sqrt(2))
    t = torch.div(torch.ones(()), z * 0.3275911 + 1)
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    upper = polynomial * torch.exp(z * -z) * 0.5
    sign: Tensor = aten.clamp.default(x * STEEP, -1.0, 1.0)
    return sign * (0.5 - upper) + 0.5


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance as sums over the last dimensions."""
    dims = list(range(x.ndim - len(shape), x.ndim))
    normal, mean, rstd = _normalize(x, dims, eps)
    return _affine(normal, weight, bias), mean, rstd


def _normalize(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    scale = 1 / math.prod(x.shape[dim] for dim in dims)
    mean = x.sum(dims, keepdim=True) * scale
    centred = x - mean
    variance = (centred * centred).sum(dims, keepdim=True) * scale
    rstd = torch.rsqrt(variance + eps)
    return centred * rstd, mean, rstd


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `layer_norm` over each group's channels and positions."""
    normal, mean, rstd = _normalize(x.reshape(N, group, C // group * HxW), [2], eps)
    channels = [1, C, *[1] * (x.ndim - 2)]
    weight, bias = (None if tensor is None else tensor.reshape(channels) for tensor in (weight, bias))
    return _affine(normal.reshape(x.shape), weight, bias), mean.reshape(N, group), rstd.reshape(N, group)

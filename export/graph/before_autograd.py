"""What is computed in another way while the module runs, so that autograd finds the better form to differentiate.

A table of decompositions works on what autograd has made of the module. Two composite functions, which no trace ever
meets, are better replaced before that: attention (`attention.py`), and batch normalisation with kept statistics, which
becomes part of the trainable convolution before it. With s = gamma / sqrt(variance + eps), s * (W x + b) + t is
(s W) x + (s b + t): autograd never comes back to the activations, and the gradients by W, gamma and beta are small
operations on those by s W and s b + t. (Frozen convolutions are folded afterwards, in `fold.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgetrain.export.graph.attention import attention

aten = torch.ops.aten

COMPOSITES: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.batch_norm.default: torch.batch_norm,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
}
"""Entries of a table of decompositions; a lowering asks for either form by having it in its own."""

_TRAINED_ONLY = {*COMPOSITES, aten.convolution.default, aten.gelu.default}
_ATTENTION = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def before_autograd(decompositions: Container[Any]) -> AbstractContextManager[object]:
    """The mode to run a module in, for a lowering with these decompositions."""
    asked = frozenset(op for op in COMPOSITES if op in decompositions)
    return BeforeAutograd(asked) if asked else nullcontext()


def standard(decompositions: Mapping[torch._ops.OpOverload, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """The same without the forms for training: a graph for inference is also what leaves the device, merged.

    There, weights are constants and convolutions fast, and other tools know only standard operators.
    """
    return {op: rule for op, rule in decompositions.items() if op not in _TRAINED_ONLY}


class _Made(NamedTuple):
    """What a convolution gave, in which state, and its call."""

    result: Tensor
    version: int
    convolve: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class BeforeAutograd(TorchFunctionMode):
    """While it is active, attention is ours, and `F.batch_norm` of a convolution is one with other weights.

    The first convolution is left without a reader. Convolutions whose weight is an `nn.Parameter`, hence frozen (what
    is trained is replaced by the trace's own tensors), stay as they are.
    """

    def __init__(self, asked: Container[Any] = frozenset(COMPOSITES)) -> None:
        super().__init__()
        self._folds = aten.batch_norm.default in asked
        self._attends = aten.scaled_dot_product_attention.default in asked
        # By identity; the tensors are kept so that no other takes their place.
        self._made: dict[int, _Made] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        del types
        kwargs = kwargs or {}
        if func is F.batch_norm and self._folds:
            fused = self._fuse(*args, **kwargs)
            return func(*args, **kwargs) if fused is None else fused
        if func in _ATTENTION and self._attends:
            attended = attention(*args, **kwargs)
            return func(*args, **kwargs) if attended is None else attended
        result = func(*args, **kwargs)
        if func in _CONVOLUTIONS and len(args) > 1 and not isinstance(args[1], nn.Parameter):
            self._made[id(result)] = _Made(result, result._version, func, args, kwargs)  # noqa: SLF001
        return result

    def _fuse(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        del momentum
        # Activations are large, and hardly two norms read the same.
        made = self._made.pop(id(x), None)
        if made is None or training or running_mean is None or running_var is None:
            return None
        result, version, convolve, args, kwargs = made
        written_to = result._version != version  # noqa: SLF001
        if written_to:
            return None
        kernel: Tensor = args[1]
        old = args[2] if len(args) > 2 else kwargs.get("bias")
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else weight * scale
        shift = -running_mean * scale if old is None else (old - running_mean) * scale
        shift = shift if bias is None else bias + shift
        settings = {key: value for key, value in kwargs.items() if key != "bias"}
        normalized = kernel.reshape(kernel.shape[0], -1) * scale.reshape(-1, 1)
        return convolve(args[0], normalized.reshape(kernel.shape), shift, *args[3:], **settings)

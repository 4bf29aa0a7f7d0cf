"""Batch normalisation with kept statistics as part of the trainable convolution before it, before differentiation.

With s = gamma / sqrt(variance + eps), s * (W x + b) + t is (s W) x + (s b + t). In that form autograd never comes back to
the activations: the gradients by W, gamma and beta are small operations on the gradients by s W and s b + t. (The
frozen convolutions are folded afterwards, in `fold.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_BATCH_NORM = torch.ops.aten.batch_norm.default
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def before_autograd(decompositions: Container[Any]) -> AbstractContextManager[object]:
    """What is rewritten while the module runs, for a lowering whose table has an entry for `aten.batch_norm`.

    A table works on what autograd has made of the module; batch_norm is composite, so that no trace ever meets it.
    """
    return NormalizeWeights() if _BATCH_NORM in decompositions else nullcontext()


class NormalizeWeights(TorchFunctionMode):
    """While it is active, `F.batch_norm` of what a convolution gave is a convolution with other weights.

    The first convolution is left without a reader. Convolutions whose weight is an `nn.Parameter`, hence frozen (what is
    trained is replaced by the trace's own tensors), stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        # By identity; the tensors are kept so that no other takes their place.
        self._made: dict[int, tuple[Tensor, Callable[..., Tensor], Sequence[Any], Mapping[str, Any]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        del types
        kwargs = kwargs or {}
        if func is F.batch_norm:
            fused = self._fuse(*args, **kwargs)
            return func(*args, **kwargs) if fused is None else fused
        result = func(*args, **kwargs)
        if func in _CONVOLUTIONS and len(args) > 1 and not isinstance(args[1], nn.Parameter):
            self._made[id(result)] = (result, func, args, kwargs)
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
        made = self._made.get(id(x))
        if made is None or training or running_mean is None or running_var is None:
            return None
        _, convolve, args, kwargs = made
        kernel: Tensor = args[1]
        old = args[2] if len(args) > 2 else kwargs.get("bias")
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else weight * scale
        shift = -running_mean * scale if old is None else (old - running_mean) * scale
        shift = shift if bias is None else bias + shift
        settings = {key: value for key, value in kwargs.items() if key != "bias"}
        normalized = kernel.reshape(kernel.shape[0], -1) * scale.reshape(-1, 1)
        return convolve(args[0], normalized.reshape(kernel.shape), shift, *args[3:], **settings)

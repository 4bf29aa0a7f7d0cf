"""Views, expansions and scalars in the forms that XNNPACK reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter

aten = torch.ops.aten

_ELEMENTWISE = (aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor)
_UNEXPANDED = (aten.div.Scalar, aten.expand.default)


def expand(rewriter: Rewriter, x: Tensor, size: Sequence[int], **kwargs: Any) -> Any:
    """Nothing to do where the shape is the same, or where the reader broadcasts by itself."""
    del kwargs
    wanted = [x.shape[i - len(size)] if n == -1 else n for i, n in enumerate(size)]
    if wanted == list(x.shape):
        return x
    if len(size) != x.ndim or not all(_broadcasts(rewriter, user, wanted) for user in rewriter.node.users):
        return NotImplemented
    return x


def _broadcasts(rewriter: Rewriter, user: fx.Node, size: Sequence[int]) -> bool:
    """Whether a reader of an expanded tensor brings another operand of the full size."""
    if user.target == aten.div.Scalar:
        return all(_broadcasts(rewriter, reader, size) for reader in user.users)
    others = [a for a in user.args if isinstance(a, fx.Node) and a is not rewriter.node]
    return user.target in _ELEMENTWISE and any(
        list(other.meta["val"].shape) == list(size) and other.target not in _UNEXPANDED for other in others
    )


def div(rewriter: Rewriter, x: Tensor, divisor: float) -> Any:
    """By a number: a product, before it is expanded rather than after."""
    del rewriter
    return x * (1 / divisor)


def mul(rewriter: Rewriter, x: Tensor, factor: float) -> Any:
    """XNNPACK multiplies by a tensor, as which a number is stored."""
    if x.dtype != torch.float32:
        return NotImplemented
    if rewriter.has_last(rewriter.node.args[0]):
        return rewriter.image(rewriter.last(0) * factor)
    return x * factor


def unsqueeze(rewriter: Rewriter, x: Tensor, dim: int) -> Tensor:
    """A view, which XNNPACK takes for any dimension."""
    del rewriter
    dim %= x.ndim + 1
    return x.reshape([*x.shape[:dim], 1, *x.shape[dim:]])


def squeeze(_rewriter: Rewriter, x: Tensor, dims: Sequence[int] | int) -> Tensor:
    """A view."""
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % x.ndim for dim in dims if x.shape[dim] == 1}
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in gone])

"""Masks of attention in finite numbers, and softmax under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter

aten = torch.ops.aten

# A mask's minus infinity: far below any score, and XNNPACK's exp makes no NaN of it.
MASKED = -1e30
_SOFTMAX = (aten._safe_softmax.default, aten._softmax.default)  # noqa: SLF001


def add(rewriter: Rewriter, a: Tensor, b: Any, *, alpha: float = 1) -> Any:
    """Attention masks in finite numbers; `alpha` spelled out."""
    if alpha != 1:
        return a + b * alpha
    node = rewriter.node
    if all(user.target in _SOFTMAX for user in node.users) and rewriter.is_static(1) and isinstance(b, Tensor):
        return a + rewriter.now(lambda: b.clamp(min=MASKED))
    return NotImplemented


def safe_softmax(rewriter: Rewriter, x: Tensor, dim: int, dtype: Any = None) -> Any:
    """Softmax that gives zeros where a whole row is masked: only a variable mask can do that."""
    if dtype not in (None, torch.float32):
        return NotImplemented
    source = rewriter.node.args[0]
    assert isinstance(source, fx.Node)
    if source.target == aten.add.Tensor:
        mask = source.args[1]
        known = rewriter.value(mask) if isinstance(mask, fx.Node) and mask in rewriter.static else None
        with disable_proxy_modes_tracing():
            may_hide_all = known is None or bool((known <= MASKED).all(-1).any())
    else:
        may_hide_all = source.target in (aten.where.self, aten.masked_fill.Scalar)
    if not may_hide_all:
        return aten._softmax.default(x, dim, False)  # noqa: SLF001
    # 0 where the score is minus infinity, 1 elsewhere.
    alive = aten.clamp.default(x - MASKED, 0.0, 1.0)
    return aten._softmax.default(aten.clamp.default(x, MASKED), dim, False) * alive  # noqa: SLF001


def where(rewriter: Rewriter, condition: Tensor, a: Tensor, b: Tensor) -> Any:
    """By a condition that is known now, between a variable and a known value: a product with a mask, and a sum."""
    if not rewriter.is_static(0) or rewriter.is_static(1) == rewriter.is_static(2):
        return NotImplemented
    variable, known = (a, b) if rewriter.is_static(2) else (b, a)
    if variable.dtype != torch.float32:
        return NotImplemented
    keep = rewriter.now((condition if rewriter.is_static(2) else ~condition).float)
    attends = all(user.target in _SOFTMAX for user in rewriter.node.users)
    rest = rewriter.now(lambda: torch.where(keep > 0, 0.0, known.clamp(min=MASKED) if attends else known))
    result = variable * keep
    with disable_proxy_modes_tracing():
        finite, any_rest = bool(torch.isfinite(rest).all()), bool(rest.any())
    if not finite or result.shape != rewriter.shape():
        return NotImplemented
    return result + rest if any_rest else result

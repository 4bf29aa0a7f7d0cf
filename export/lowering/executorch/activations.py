"""GELU, and batch normalisation with running statistics, on images channels-last where these are at hand so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgetrain.export.lowering.executorch import decompositions

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter


def gelu(rewriter: Rewriter, x: Tensor, *, approximate: str = "none") -> Any:
    """The tanh form spelled out where the trace left it whole, as in graphs for inference."""
    if approximate == "none":
        return NotImplemented
    if rewriter.has_last(rewriter.node.args[0]):
        return rewriter.image(decompositions.gelu(rewriter.last(0), approximate=approximate))
    return decompositions.gelu(x, approximate=approximate)


def batch_norm(
    rewriter: Rewriter,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *rest: Any,
) -> Any:
    """With running statistics: a scale and a shift; what a convolution could take was folded before."""
    training, eps = (False, rest[1]) if len(rest) == 2 else (rest[0], rest[2])
    if training:
        return NotImplemented
    inverse = rewriter.now(lambda: torch.rsqrt(var + eps))
    scale = inverse if weight is None else weight * inverse
    shift = -mean * scale if bias is None else bias - mean * scale
    empty = rewriter.constant(torch.zeros, (0,))
    if rewriter.has_last(rewriter.node.args[0]):
        return rewriter.image(rewriter.last(0) * scale + shift, 0), empty, empty
    channels = [1, -1, *[1] * (x.ndim - 2)]
    return x * scale.reshape(channels) + shift.reshape(channels), empty, empty

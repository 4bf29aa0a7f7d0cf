"""Matrix products as XNNPACK takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter

# Columns that XNNPACK computes at a time where registers are widest (AVX-512); a narrower product leaves some empty.
LANES = 32


def mm(rewriter: Rewriter, a: Tensor, b: Tensor) -> Any:
    """XNNPACK multiplies by a constant matrix, or two variable ones as a batch."""
    if a.dtype != torch.float32 or rewriter.is_static(1):
        return NotImplemented
    return _mm_variable(a, b)


def addmm(rewriter: Rewriter, bias: Tensor, a: Tensor, b: Tensor, **scales: Any) -> Any:
    """As `mm`, and the bias added; with constant matrix and bias it stays what it is."""
    if scales or a.dtype != torch.float32 or (rewriter.is_static(0) and rewriter.is_static(2)):
        return NotImplemented
    if rewriter.is_static(2):
        return torch.mm(a, b) + bias
    return _mm_variable(a, b) + bias


def _mm_variable(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.reshape(1, *a.shape), b.reshape(1, *b.shape)).reshape(a.shape[0], b.shape[1])

"""Sums and means as products with ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgetrain.export.lowering.executorch.products import LANES

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter

aten = torch.ops.aten

# Sums of fewer elements stay with ExecuTorch's own kernel.
SMALL = 512


def sum_(rewriter: Rewriter, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Products with ones."""
    if x.dtype != torch.float32 or x.numel() < SMALL or kwargs:
        return NotImplemented
    summed = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    return _image_sum(rewriter, summed, 1.0, keepdim=keepdim, otherwise=x)


def mean(rewriter: Rewriter, x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Global pooling, which XNNPACK has, or a sum."""
    if x.dtype != torch.float32 or x.numel() < SMALL or kwargs:
        return NotImplemented
    summed = sorted(dim % x.ndim for dim in dims) if dims else list(range(x.ndim))
    weight = 1 / math.prod(x.shape[dim] for dim in summed)
    if x.ndim == 4 and summed == [2, 3] and not rewriter.has_last(rewriter.node.args[0]):
        pooled = aten.mean.dim(x, summed, True)
        return pooled if keepdim else pooled.reshape(x.shape[:2])
    return _image_sum(rewriter, summed, weight, keepdim=keepdim, otherwise=x)


def _image_sum(rewriter: Rewriter, dims: list[int], weight: float, *, keepdim: bool, otherwise: Tensor) -> Tensor:
    """Of the current call's first argument, channels-last if it is an image at hand so."""
    x = otherwise
    if not (x.ndim == 4 and {2, 3} <= set(dims) and rewriter.has_last(rewriter.node.args[0])):
        return _weighted_sum(rewriter, x, dims, weight, keepdim=keepdim)
    there = sorted({0: 0, 1: 3, 2: 1, 3: 2}[dim] for dim in dims)
    total = _weighted_sum(rewriter, rewriter.last(0), there, weight, keepdim=False)
    # What is left, samples and channels, is in the same order in both.
    return total.reshape([1 if dim in dims else size for dim, size in enumerate(x.shape)]) if keepdim else total


def _weighted_sum(rewriter: Rewriter, x: Tensor, dims: list[int], weight: float, *, keepdim: bool) -> Tensor:
    shape = x.shape
    for first, last in reversed(_runs(dims)):
        before, count = math.prod(shape[:first]), math.prod(shape[first : last + 1])
        after = x.numel() // (before * count)
        if after == 1:
            ones = rewriter.constant(torch.full, (1, count, 1), weight)
            x = torch.bmm(x.reshape(1, before, count), ones)
        else:
            together = max(LANES // after, 1)
            if before == 1 and together > 1 and count % together == 0:
                # A narrow product is packed with as many empty columns: several rows stand in one.
                ones = rewriter.constant(torch.full, (1, 1, count // together), weight)
                x = torch.bmm(ones, x.reshape(1, count // together, together * after))
                count, weight = together, 1.0
            ones = rewriter.constant(torch.full, (before, 1, count), weight)
            x = torch.bmm(ones, x.reshape(before, count, after))
        weight = 1.0
    if keepdim:
        return x.reshape([1 if dim in dims else size for dim, size in enumerate(shape)])
    return x.reshape([size for dim, size in enumerate(shape) if dim not in dims])


def _runs(dims: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbouring dimensions."""
    runs: list[tuple[int, int]] = []
    for dim in dims:
        if runs and runs[-1][1] == dim - 1:
            runs[-1] = runs[-1][0], dim
        else:
            runs.append((dim, dim))
    return runs

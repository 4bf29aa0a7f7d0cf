"""Which operators are replaced in the rewritten graph, and by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgetrain.export.lowering.executorch import activations, convolution_rules, masks, products, reductions, shapes

aten = torch.ops.aten

RULES: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: activations.batch_norm,  # noqa: SLF001
    aten._safe_softmax.default: masks.safe_softmax,  # noqa: SLF001
    aten.add.Tensor: masks.add,
    aten.addmm.default: products.addmm,
    aten.convolution.default: convolution_rules.convolution,
    aten.convolution_backward.default: convolution_rules.convolution_backward,
    aten.div.Scalar: shapes.div,
    aten.expand.default: shapes.expand,
    aten.gelu.default: activations.gelu,
    aten.max_pool2d_with_indices.default: convolution_rules.max_pool,
    aten.max_pool2d_with_indices_backward.default: convolution_rules.max_pool_backward,
    aten.mean.dim: reductions.mean,
    aten.mm.default: products.mm,
    aten.mul.Scalar: shapes.mul,
    aten.native_batch_norm.default: activations.batch_norm,
    aten.squeeze.dim: shapes.squeeze,
    aten.squeeze.dims: shapes.squeeze,
    aten.sum.default: reductions.sum_,
    aten.sum.dim_IntList: reductions.sum_,
    aten.unsqueeze.default: shapes.unsqueeze,
    aten.where.self: masks.where,
}

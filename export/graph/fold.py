"""Frozen batch normalisation disappears into the frozen convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edgetrain.export.graph.nodes import is_constant

aten = torch.ops.aten


def fold_batch_norms(module: fx.GraphModule) -> int:
    """Rewrites `batch_norm(convolution(x))` with constant weights as one convolution, in place.

    Left alone: a convolution or a weight that something else reads too, such as a backward pass.

    Returns:
        How many were folded.
    """
    folded = 0
    for node in list(module.graph.nodes):
        if node.target is aten.native_batch_norm.default and _fits(node):
            _fold(module, node, f"folded_{folded}")
            folded += 1
    if folded:
        module.graph.eliminate_dead_code()
        module.recompile()
    return folded


def _fits(norm: fx.Node) -> bool:
    convolution: Any = norm.args[0]
    if norm.args[5] or any(user.users and user.args[1] != 0 for user in norm.users):
        return False
    if convolution.target is not aten.convolution.default or len(convolution.users) > 1:
        return False
    if convolution.args[6]:  # transposed
        return False
    weight, bias = convolution.args[1:3]
    statistics = [value for value in (bias, *norm.args[1:5]) if value is not None]
    return is_constant(weight) and len(weight.users) == 1 and all(map(is_constant, statistics))


def _fold(module: fx.GraphModule, norm: fx.Node, name: str) -> None:
    convolution: Any = norm.args[0]

    def value(node: Any) -> Tensor | None:
        return None if node is None else getattr(module, node.target)

    weight, bias = value(convolution.args[1]), value(convolution.args[2])
    gamma, beta, mean, variance = (value(node) for node in norm.args[1:5])
    epsilon: Any = norm.args[7]
    assert weight is not None
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + epsilon) * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale + (0.0 if bias is None else bias * scale)
    module.register_buffer(f"{name}_weight", weight * scale.view(-1, *[1] * (weight.ndim - 1)))
    module.register_buffer(f"{name}_bias", shift)
    with module.graph.inserting_before(convolution):
        new_weight = module.graph.get_attr(f"{name}_weight")
        new_bias = module.graph.get_attr(f"{name}_bias")
    convolution.args = (convolution.args[0], new_weight, new_bias, *convolution.args[3:])
    for user in list(norm.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(convolution)

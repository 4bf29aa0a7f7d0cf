"""Clipping by sample without every sample's gradient in memory, where a gradient is a product.

The gradient of a linear layer's weight is, sample by sample, a product x_i y_i of [m, T] and [T, n] (T = 1 without
tokens). Its norm and the clipped sum need no [B, m, n]:

    |x_i y_i|^2    = sum((x_i' x_i) * (y_i y_i'))
    sum_i f_i x_i y_i = (f x) y, one matrix product over all samples and tokens

Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Li et al., "Large Language Models Can Be Strong
Differentially Private Learners", ICLR 2022 ("ghost clipping").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from edgetrain.export.graph.nodes import call

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.clone.default)  # noqa: SLF001


class _Product(NamedTuple):
    # bmm of [B, m, T] and [B, T, n], and whether what is used is its transpose.
    node: fx.Node
    transposed: bool


def use_ghost_norms(module: fx.GraphModule) -> None:
    """Rewrites squared norms and weighted sums of batched products; what does not look like one stays.

    Args:
        module: a trace of `step_per_sample_clipped`, in which norms are `(g * g).sum(1)` and sums are `f @ g` of
            gradients flattened to [B, numel].
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten.sum.dim_IntList and _is_view(node):
            # Convolutions of a single "batch" of all samples end so.
            with graph.inserting_before(node):
                shape = list(_size(node))
                node.replace_all_uses_with(call(graph, aten.reshape.default, node.args[0], shape))
        elif node.target is aten.sum.dim_IntList and _is_square(node.args[0]) and node.args[1] == [1]:
            product = _product(node.args[0].args[0])
            if product:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_squared_norms(graph, product))
        elif node.target is aten.mm.default and _size(node.args[0])[0] == 1:
            product = _product(node.args[1])
            if product and _size(node.args[0])[1] == _size(product.node)[0]:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_weighted_sum(graph, product, node.args[0]))
    graph.eliminate_dead_code()
    module.recompile()


def _is_view(node: fx.Node) -> bool:
    """Whether a sum is over dimensions of size 1 only."""
    sizes, dims = _size(node.args[0]), node.args[1]
    return isinstance(dims, list) and bool(dims) and all(sizes[dim] == 1 for dim in dims)


def _is_square(node: fx.node.Argument) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.mul.Tensor and node.args[0] is node.args[1]


def _product(flat: fx.node.Argument) -> _Product | None:
    """The batched product that a [B, numel] view shows, if it pays to know."""
    transposed = False
    node = flat
    while isinstance(node, fx.Node) and (node.target in _RESHAPES or node.target is aten.permute.default):
        inner = node.args[0]
        if node.target is aten.permute.default:
            if node.args[1] != [0, 2, 1]:
                return None
            transposed = not transposed
        elif _size(node) != _size(inner) and not (node is flat and len(_size(inner)) == 3):
            return None
        node = inner
    if not isinstance(node, fx.Node) or node.target is not aten.bmm.default:
        return None
    (_, m, tokens), n = _size(node.args[0]), _size(node.args[1])[2]
    return _Product(node, transposed) if tokens * (m + n) < m * n else None


def _squared_norms(graph: fx.Graph, product: _Product) -> fx.Node:
    """[B]."""
    x, y = product.node.args
    if _size(x)[2] == 1:
        parts = [call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, part, part), [1, 2]) for part in (x, y)]
        return call(graph, aten.mul.Tensor, *parts)
    of_x = call(graph, aten.bmm.default, call(graph, aten.permute.default, x, [0, 2, 1]), x)
    of_y = call(graph, aten.bmm.default, y, call(graph, aten.permute.default, y, [0, 2, 1]))
    return call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, of_x, of_y), [1, 2])


def _weighted_sum(graph: fx.Graph, product: _Product, factors: fx.node.Argument) -> fx.Node:
    """[1, numel]."""
    x, y = product.node.args
    B, m, tokens = _size(x)
    n = _size(y)[2]
    weights = call(graph, aten.reshape.default, factors, [B, 1, 1])
    x = call(graph, aten.permute.default, call(graph, aten.mul.Tensor, x, weights), [1, 0, 2])
    x = call(graph, aten.reshape.default, x, [m, B * tokens])
    total = call(graph, aten.mm.default, x, call(graph, aten.reshape.default, y, [B * tokens, n]))
    if product.transposed:
        total = call(graph, aten.permute.default, total, [1, 0])
    return call(graph, aten.reshape.default, total, [1, m * n])


def _size(node: fx.node.Argument) -> tuple[int, ...]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)

"""Views and permutations of an edge program: what undoes itself goes, and what is left stands where it costs least.

A linear layer turns its weights, its backward pass turns them back, and gradients are turned twice: each a copy, and
kept from the forward to the backward pass. Every tensor of an edge program is row-major, so a permutation of a
permutation is one, or none, whatever lay between in torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from executorch.exir.dialects._ops import ops
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

PERMUTE = ops.edge.aten.permute_copy.default
VIEW = ops.edge.aten.view_copy.default
PRODUCT = ops.edge.aten.bmm.default


def simplify_turns(module: fx.GraphModule) -> PassResult:
    """The pass, for `to_edge_transform_and_lower`."""
    changed = False
    while sweep(module.graph):
        changed = True
        module.graph.eliminate_dead_code()
    if changed:
        module.graph.lint()
        module.recompile()
    return PassResult(module, changed)


def view_for_each(module: fx.GraphModule) -> PassResult:
    """The pass that gives every reader of a view one of its own.

    So a reader in another partition makes it outside, where it is free, and no tensor is kept in two shapes. Within
    a partition, `peephole` makes them one again.
    """
    changed = False
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target == VIEW:
            for user in list(node.users)[1:]:
                source, shape = node.args
                user.replace_input_with(node, _call(node, VIEW, source, shape))
                changed = True
    if changed:
        module.graph.lint()
        module.recompile()
    return PassResult(module, changed)


def sweep(graph: fx.Graph) -> bool:
    """Simplifies every view and permutation once; what is no longer read stays. Returns whether anything changed."""
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (PERMUTE, VIEW) or not node.users:
            continue
        better = _better(node)
        # A program cannot hand an input through.
        if better is not None and not (better.op == "placeholder" and any(user.op == "output" for user in node.users)):
            node.replace_all_uses_with(better)
            changed = True
    return changed


def _better(node: fx.Node) -> fx.Node | None:
    """The same tensor with fewer copies, or None."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape, before = list(node.meta["val"].shape), list(source.meta["val"].shape)
    if node.target == VIEW:
        return _better_view(node, source, shape, before)
    order = _order(node)
    if source.target == PERMUTE:
        inner = _order(source)
        root = source.args[0]
        assert isinstance(root, fx.Node)
        order = [inner[axis] for axis in order]
        return root if order == sorted(order) else _call(node, PERMUTE, root, order)
    # Where only dimensions of size 1 move, nothing does.
    kept = [axis for axis in order if before[axis] != 1]
    return _call(node, VIEW, source, shape) if kept == sorted(kept) else None


def _better_view(node: fx.Node, source: fx.Node, shape: list[int], before: list[int]) -> fx.Node | None:
    if shape == before:
        return source
    root = source.args[0] if source.target in (PERMUTE, VIEW) else None
    if not isinstance(root, fx.Node):
        return None
    if source.target == VIEW:
        return root if shape == list(root.meta["val"].shape) else _call(node, VIEW, root, shape)
    # Turning twice is worth it where a product turns its operand by itself.
    if len(source.users) > 1 and not all(user.target == PRODUCT and user.args[0] is not node for user in node.users):
        return None
    # One more dimension in front of a permutation, as products want it: first the dimension, then the permutation.
    extra = len(shape) - len(before)
    if extra > 0 and shape == [1] * extra + before:
        wider = _call(node, VIEW, root, [1] * extra + list(root.meta["val"].shape))
        order = [*range(extra), *(axis + extra for axis in _order(source))]
        return _call(node, PERMUTE, wider, order)
    # And one dimension less: the same the other way round.
    extra = -extra
    if extra > 0 and before == [1] * extra + shape and _order(source)[:extra] == list(range(extra)):
        narrower = _call(node, VIEW, root, list(root.meta["val"].shape)[extra:])
        return _call(node, PERMUTE, narrower, [axis - extra for axis in _order(source)[extra:]])
    return None


def _order(node: fx.Node) -> list[int]:
    order = node.args[1]
    assert isinstance(order, Sequence)
    rank = len(order)
    return [int(axis) % rank for axis in order]  # type: ignore[arg-type]  # a permutation is known


def _call(node: fx.Node, target: object, source: fx.Node, argument: list[int]) -> fx.Node:
    """A new node before `node`."""
    graph = node.graph
    with graph.inserting_before(node):
        made = graph.call_function(target, (source, argument))  # type: ignore[arg-type]  # an edge operator
    made.meta = {**node.meta, "val": target(source.meta["val"], argument)}  # type: ignore[operator]
    assert math.prod(made.meta["val"].shape) == math.prod(node.meta["val"].shape)
    return made

"""Elementwise operators of an edge program in the shapes of the products around them.

A product wants three dimensions, the model computes in others, and XNNPACK copies wherever a tensor that is read twice
changes its shape. Elementwise operators do not care: each is computed in the shape that leaves the fewest views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from executorch.exir.dialects._ops import ops
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from edgetrain.export.lowering.executorch.turns import PRODUCT, VIEW, sweep

_aten = ops.edge.aten
_ELEMENTWISE = frozenset(
    {
        _aten.abs.default,
        _aten.add.Tensor,
        _aten.clamp.default,
        _aten.div.Tensor,
        _aten.exp.default,
        _aten.gelu.default,
        _aten.hardtanh.default,
        _aten.leaky_relu.default,
        _aten.log.default,
        _aten.maximum.default,
        _aten.minimum.default,
        _aten.mul.Tensor,
        _aten.neg.default,
        _aten.pow.Tensor_Scalar,
        _aten.reciprocal.default,
        _aten.relu.default,
        _aten.rsqrt.default,
        _aten.sigmoid.default,
        _aten.sqrt.default,
        _aten.sub.Tensor,
        _aten.tanh.default,
    }
)
# Each lets shapes travel on through the graph; few are left to change after the second.
_SWEEPS = 4

Shape = tuple[int, ...]


def settle_shapes(module: fx.GraphModule) -> PassResult:
    """The pass, for `to_edge_transform_and_lower`."""
    graph = module.graph
    changed = False
    for _ in range(_SWEEPS):
        # A list: each change adds nodes.
        moved = [_settle(node) for node in list(graph.nodes) if node.op == "call_function"]
        while sweep(graph):
            graph.eliminate_dead_code()
        if not any(moved):
            break
        changed = True
        graph.eliminate_dead_code()
    if changed:
        graph.lint()
        module.recompile()
    return PassResult(module, changed)


def shape_of(node: fx.Node) -> Shape:
    """Of a node's tensor."""
    return tuple(node.meta["val"].shape)


def _settle(node: fx.Node) -> bool:
    if node.target not in _ELEMENTWISE or not node.users or node.meta["val"].dtype != torch.float32:
        return False
    here = shape_of(node)
    full = [n for n in node.all_input_nodes if shape_of(n) == here]
    small = [n for n in node.all_input_nodes if shape_of(n) != here]
    if not full:
        return False
    there = {shape_of(n.args[0]) for n in full if n.target == VIEW}  # type: ignore[arg-type]  # a view's source
    there |= {shape_of(user) for user in node.users if user.target == VIEW}
    possible = [t for t in there - {here} if all(_adapted(shape_of(n), here, t) is not None for n in small)]
    # Views can be as cheap in two shapes: rather that of a product.
    best = min([here, *sorted(possible)], key=lambda shape: (_views(node, full, shape), not _of_product(node, full, shape)))
    if best == here:
        return False
    known = {n: viewed(n, best) for n in full}
    for n in small:
        adapted = _adapted(shape_of(n), here, best)
        assert adapted is not None
        known[n] = viewed(n, adapted)
    with node.graph.inserting_before(node):
        new = node.graph.node_copy(node, lambda n: known[n])
    new.meta = {**node.meta, "val": node.meta["val"].new_empty(best)}
    back = viewed(new, here)
    node.replace_all_uses_with(back, propagate_meta=False)
    return True


def _views(node: fx.Node, full: Sequence[fx.Node], shape: Shape) -> float:
    """How many tensors of full size are copied if this node is computed in a shape."""
    here = shape_of(node)
    count = 0.0
    for n in full:
        if n.target == VIEW:
            root = n.args[0]
            assert isinstance(root, fx.Node)
            count += (shape_of(root) != shape) * (1.0 if len(n.users) == 1 or shape != here else 0.5)
        elif shape != here:
            count += 0.0 if any(user.target == VIEW and shape_of(user) == shape for user in n.users) else 1.0
    wanted = {shape_of(user) for user in node.users if user.target == VIEW}
    others = [user for user in node.users if user.target != VIEW]
    if others and shape != here:
        # Who is elementwise can follow.
        count += 0.5 if all(user.target in _ELEMENTWISE for user in others) else 1.0
    return count + len(wanted - {shape})


def _of_product(node: fx.Node, full: Sequence[fx.Node], shape: Shape) -> bool:
    near = [n.args[0] if n.target == VIEW else n for n in full]
    if any(isinstance(n, fx.Node) and n.target == PRODUCT and shape_of(n) == shape for n in near):
        return True
    readers = [reader for user in node.users for reader in (user.users if user.target == VIEW else [user])]
    return any(
        reader.target == PRODUCT and any(shape_of(n) == shape for n in reader.all_input_nodes) for reader in readers
    )


def _adapted(operand: Shape, here: Shape, there: Shape) -> Shape | None:
    """The shape in which a smaller operand means the same there, if there is one."""
    if math.prod(operand) == 1:
        return operand if len(operand) <= len(there) else (1,) * len(there)
    if here[-1] != there[-1]:
        return None
    padded = (1,) * (len(here) - len(operand)) + operand
    if padded == (1,) * (len(here) - 1) + here[-1:]:
        return operand if len(operand) <= len(there) else (1,) * (len(there) - 1) + here[-1:]
    if padded == (*here[:-1], 1):
        return (*there[:-1], 1)
    return None


def viewed(node: fx.Node, shape: Shape) -> fx.Node:
    """The node in a shape: itself, what it is a view of, a view that is there, or a new one."""
    if shape_of(node) == shape:
        return node
    root = node.args[0] if node.target == VIEW else node
    assert isinstance(root, fx.Node)
    if shape_of(root) == shape:
        return root
    found = next((user for user in root.users if user.target == VIEW and shape_of(user) == shape), None)
    if found is None:
        found = node.graph.call_function(VIEW, (root, list(shape)))
        found.meta = {**node.meta, "val": root.meta["val"].new_empty(shape)}
    # As early as can be: others may read it too. Inputs stay together.
    before = root
    while before.next.op == "placeholder":
        before = before.next
    before.append(found)
    return found

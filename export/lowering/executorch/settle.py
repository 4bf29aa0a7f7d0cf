"""Elementwise operators of an edge program in the shapes of the products around them.

A product wants three dimensions, the model computes in others, and XNNPACK copies wherever a tensor that is read twice
changes its shape. Elementwise operators do not care: each is computed in the shape that leaves the fewest views.
"""

from __future__ import annotations

import math

import torch
from executorch.exir.dialects._ops import ops
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from edgetrain.export.lowering.executorch.turns import VIEW, sweep

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
        ops.edge.quantized_decomposed.dequantize_per_tensor.default,
        ops.edge.quantized_decomposed.quantize_per_tensor.default,
    }
)
# Each lets shapes travel on through the graph; few are left to change after the second.
_SWEEPS = 4

Shape = tuple[int, ...]


def settle_shapes(module: fx.GraphModule) -> PassResult:
    """The pass, for `to_edge_transform_and_lower`."""
    graph = module.graph
    changed = False
    if any(_has_reasons(node) for node in graph.nodes):
        return PassResult(module, False)
    for _ in range(_SWEEPS):
        # A list: each change adds nodes.
        moved = [_settle(group) for group in _groups(graph)]
        if not any(moved):
            break
        changed = True
        graph.eliminate_dead_code()
        while sweep(graph):
            graph.eliminate_dead_code()
    if changed:
        graph.lint()
        module.recompile()
    return PassResult(module, changed)


def _has_reasons(node: fx.Node) -> bool:
    """Whether it tells of a program whose shapes are chosen already.

    Windows are gathered from images outside of XNNPACK, where views are free: five percent slower when settled.
    Integers are recognised by XNNPACK where an operator stands right between their conversions.
    """
    return node.target == _aten.as_strided_copy.default or "quantized_decomposed" in str(node.target)


def shape_of(node: fx.Node) -> Shape:
    """Of a node's tensor."""
    return tuple(node.meta["val"].shape)


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Elementwise operators of one shape that read each other, in the order of the graph."""
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target not in _ELEMENTWISE or node.meta["val"].dtype != torch.float32 or not _full(node):
            continue
        group_of[node] = [node]
        for other in _full(node):
            if other in group_of and group_of[other] is not group_of[node]:
                merged = group_of[other] + group_of[node]
                group_of |= dict.fromkeys(merged, merged)
    position = {node: index for index, node in enumerate(graph.nodes)}
    distinct = {id(group): group for group in group_of.values()}
    return [sorted(group, key=position.__getitem__) for group in distinct.values()]


def _full(node: fx.Node) -> list[fx.Node]:
    """The operands of the result's shape."""
    return [n for n in node.all_input_nodes if shape_of(n) == shape_of(node)]


def _small(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if shape_of(n) != shape_of(node)]


def _settle(group: list[fx.Node]) -> bool:
    here = shape_of(group[0])
    seen = [n.args[0] for node in group for n in _full(node) if n.target == VIEW]
    seen += [user for node in group for user in node.users if user.target == VIEW]
    best, chosen, gain = here, group, 0
    for there in sorted({shape_of(n) for n in seen if isinstance(n, fx.Node)} - {here}):
        able = [n for n in group if all(_adapted(shape_of(small), here, there) is not None for small in _small(n))]
        saved = _views(able, here) - _views(able, there)
        if saved > gain:
            best, chosen, gain = there, able, saved
    if best != here:
        _move(chosen, here, best)
    return best != here


def _views(group: list[fx.Node], shape: Shape) -> int:
    """How many tensors of full size change their shape at the border of a group that is computed in a shape."""
    members = set(group)
    count = 0
    for n in {n for node in group for n in _full(node) if n not in members}:
        root = n.args[0] if n.target == VIEW else n
        assert isinstance(root, fx.Node)
        count += shape_of(root) != shape and not any(_is_view(user, shape) for user in root.users if user is not n)
    for node in group:
        left = [user for user in node.users if user not in members]
        wanted = {shape_of(user) if user.target == VIEW else shape_of(node) for user in left}
        count += len(wanted - {shape})
    return count


def _is_view(node: fx.Node, shape: Shape) -> bool:
    return node.target == VIEW and shape_of(node) == shape


def _move(group: list[fx.Node], here: Shape, there: Shape) -> None:
    for node in group:
        known = {n: viewed(n, there) for n in _full(node)}
        for n in _small(node):
            adapted = _adapted(shape_of(n), here, there)
            assert adapted is not None
            known[n] = viewed(n, adapted)
        with node.graph.inserting_before(node):
            new = node.graph.node_copy(node, known.__getitem__)
        new.meta = {**node.meta, "val": node.meta["val"].new_empty(there)}
        # The members that follow read through this view.
        node.replace_all_uses_with(viewed(new, here))


def _adapted(operand: Shape, here: Shape, there: Shape) -> Shape | None:
    """The shape in which a smaller operand means the same there, if there is one."""
    if math.prod(operand) == 1:
        return operand if len(operand) <= len(there) else (1,) * len(there)
    padded = (1,) * (len(here) - len(operand)) + operand
    repeated = next(i for i, size in enumerate(padded) if size != 1)
    last = len(here) - repeated
    if padded[repeated:] == here[repeated:] and here[repeated:] == there[-last:]:
        return operand if len(operand) <= len(there) else (1,) * (len(there) - last) + there[-last:]
    # One value a row.
    return (*there[:-1], 1) if padded == (*here[:-1], 1) and here[-1] == there[-1] else None


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

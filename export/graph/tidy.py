"""A fresh trace made fit for lowering: named constants, no aliases, no unused inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Operators that return their input.
_ALIASES = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh.default)
_ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
# A view must stay a view as long as something may be written through it.
VIEWS = (aten.as_strided.default,)


def mutates(module: fx.GraphModule) -> bool:
    """Whether the graph writes in place, or holds views that only make sense with storage behind them."""
    return any(
        node.target in VIEWS
        or (
            isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001
            and node.target._schema.is_mutable  # noqa: SLF001
            and node.target not in _ALIASES
        )
        for node in module.graph.nodes
    )


def name_constants(module: fx.GraphModule, names: dict[int, str]) -> None:
    """Gives captured frozen tensors the names that they have in the user's module.

    Args:
        module: a fresh trace.
        names: by the identity of the tensor.
    """
    names = dict(names)
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        label = names.get(id(tensor))
        if label is None:
            continue
        attribute = frozen_attribute(label)
        while hasattr(module, attribute) and getattr(module, attribute) is not tensor:
            attribute += "_"
        if not hasattr(module, attribute):
            module.register_buffer(attribute, tensor.detach())
        names[id(getattr(module, attribute))] = label
        node.target = attribute


def frozen_attribute(name: str) -> str:
    """What a graph calls a frozen tensor of the user's module, with underscores behind it if that is taken."""
    return "frozen_" + name.replace(".", "_")


def simplify(module: fx.GraphModule) -> None:
    """Removes aliases and dead code, and gives every output a node of its own."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default:
            # Whether a view is possible depends on strides, which another trace may choose differently.
            node.target = aten.reshape.default
        elif node.target is aten.full_like.default and _only_chosen(node):
            with graph.inserting_before(node):
                # As large as its shape it would be stored in the program, once for every attention mask.
                options = {"dtype": node.meta["val"].dtype}
                node.replace_all_uses_with(graph.call_function(aten.scalar_tensor.default, (node.args[1],), options))
            graph.erase_node(node)
        elif node.target in _ARITHMETIC and isinstance(node.args[0], int | float):
            with graph.inserting_before(node):
                # As a tensor: some translators read a number in first place as the wrong type.
                options = {"dtype": node.args[1].meta["val"].dtype}
                number = graph.call_function(aten.scalar_tensor.default, (node.args[0],), options)
            node.args = (number, *node.args[1:])
    output = graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    seen: set[fx.Node] = set()
    for index, result in enumerate(results):
        if result.op != "call_function" or result in seen:
            with graph.inserting_before(output):
                results[index] = graph.call_function(aten.clone.default, (result,))
        seen.add(result)
    output.args = (tuple(results),)
    graph.eliminate_dead_code()
    module.recompile()


def _only_chosen(node: fx.Node) -> bool:
    """Whether every user takes it as one side of a `where` whose other side already has the result's shape."""
    return bool(node.users) and all(
        user.target is aten.where.self
        and node is not user.args[0]
        and any(
            isinstance(side, fx.Node) and side is not node and side.meta["val"].shape == user.meta["val"].shape
            for side in user.args[1:]
        )
        for user in node.users
    )


def drop_unused_leaves(module: fx.GraphModule, num_parameters: int) -> list[int]:
    """Erases placeholders of batch leaves that nothing reads. Returns the indices of those that stay."""
    kept = []
    for index, node in enumerate(n for n in list(module.graph.nodes) if n.op == "placeholder"):
        if node.users or index < num_parameters:
            kept.append(index)
        else:
            module.graph.erase_node(node)
    module.recompile()
    return kept

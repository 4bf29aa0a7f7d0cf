"""Rows that nothing reads are not computed.

A classifier of texts takes the first position of its last layer and throws the others away. Then that layer's output
projection, feed-forward network and norms are needed for one position in a hundred, and so are their gradients; only
its keys and values need all. Eager torch cannot know that beforehand. Here the module's forward graph is looked at from
its end: what is selected from a tensor is asked of whatever made it, as long as every reader asks for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgetrain.export.graph.joint import Problem
from edgetrain.export.graph.nodes import shape_of
from edgetrain.export.prepare import plain_math
from edgetrain.export.quiet import quiet

aten = torch.ops.aten

_UNARY = (
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.dropout.default, aten.contiguous.default, aten.clone.default,
)  # fmt: skip
_BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_SHAPED = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Rows:
    """The rows `start` to `start + length` along a dimension."""

    dim: int
    start: int
    length: int


def narrowed_problem(problem: Problem) -> Problem | None:
    """The same problem with a module that computes only the rows that are read.

    Returns:
        None if that is all of them, or if torch.export cannot see through the module. The new module's batch size is
        the example's.
    """
    inputs = problem.example.inputs
    args, kwargs = inputs.call_arguments(inputs.tensors)
    module = problem.prepared.module
    watch = _Watch()
    with plain_math(module), torch.no_grad(), quiet():
        with watch:
            module(*args, **kwargs)
        if not (watch.attends and watch.selects):
            return None
        try:
            exported = torch.export.export(module, args, kwargs, strict=False).module(check_guards=False)
        except Exception:  # noqa: BLE001 - whatever it met: nothing is lost by going on without
            return None
    assert isinstance(exported, fx.GraphModule)
    exported.requires_grad_(False)
    if not set(problem.names) <= {name for name, _ in exported.named_parameters()} or not narrow(exported):
        return None
    return replace(problem, prepared=replace(problem.prepared, module=exported))


def narrow(module: fx.GraphModule) -> bool:
    """Rewrites a forward graph, in place. Returns whether anything became smaller."""
    needs = _needs(module.graph)
    if not needs:
        return False
    graph = module.graph
    small: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        rows = _selected(node)
        with graph.inserting_after(node):
            if rows is not None and needs.get(node.args[0]) == rows:
                given = small[node.args[0]]
                if node.target is aten.select.int:
                    node.args = (given, rows.dim, 0)
                else:
                    node.replace_all_uses_with(given)
                    graph.erase_node(node)
        if node in needs:
            small[node] = _copy_narrowed(graph, node, needs, small)
    for node in needs:  # readers first
        if not node.users:  # also attention, which may draw random numbers and so counts as alive
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return True


def _needs(graph: fx.Graph) -> dict[fx.Node, Rows]:
    """Nodes of which all readers want the same rows, and that can be computed for those alone."""
    asked: dict[fx.Node, set[Rows | None]] = {}
    needs: dict[fx.Node, Rows] = {}
    for node in reversed(graph.nodes):
        wanted = asked.get(node, set())
        (rows,) = wanted if len(wanted) == 1 else (None,)
        sources = None if rows is None else _sources(node, rows.dim)
        if rows is not None and sources is not None:
            needs[node] = rows
        selected = _selected(node)
        for source in node.all_input_nodes:
            ask: Rows | None = None
            if node in needs and sources is not None and source in sources:
                assert rows is not None
                ask = replace(rows, dim=sources[source])
            elif selected is not None and source is node.args[0]:
                ask = selected
            asked.setdefault(source, set()).add(ask)
    return needs


def _selected(node: fx.Node) -> Rows | None:
    if node.target not in (aten.select.int, aten.slice.Tensor) or len(node.args) < 3 or len(shape_of(node.args[0])) < 3:
        return None
    given: Any = node.args[1]
    dim = given % len(shape_of(node.args[0]))
    size = shape_of(node.args[0])[dim]
    bounds: Sequence[Any] = node.args[2:]
    if not all(isinstance(bound, int) for bound in bounds) or len(bounds) > 2:
        return None
    start, stop, _ = slice(bounds[0], bounds[1] if len(bounds) > 1 else bounds[0] % size + 1).indices(size)
    if node.target is aten.select.int:
        start, stop = bounds[0] % size, bounds[0] % size + 1
    return Rows(dim, start, stop - start) if 0 < stop - start < size else None


def _sources(node: fx.Node, dim: int) -> dict[fx.Node, int] | None:
    """Which inputs must have the same rows for a node to have them along `dim`, and along which dimension of theirs.

    None if it does not work row by row.
    """
    target = node.target
    args: Sequence[Any] = node.args
    first: Any = args[0] if args else None
    if target in _UNARY:
        return {first: dim}
    if target in _BINARY:
        return _broadcast(node, dim)
    if target in _SHAPED:
        return {first: dim} if shape_of(first)[: dim + 1] == shape_of(node)[: dim + 1] else None
    rank = len(shape_of(node))
    if target is aten.linear.default:
        return {first: dim} if dim < rank - 1 else None
    if target is aten.layer_norm.default:
        return {first: dim} if dim < rank - len(args[1]) else None
    if target is aten.softmax.int:
        return {first: dim} if args[1] % rank != dim else None
    if target is aten.transpose.int:
        axes = list(range(rank))
        a, b = (axis % rank for axis in args[1:3])
        axes[a], axes[b] = b, a
        return {first: axes[dim]}
    if target is aten.permute.default:
        return {first: args[1][dim] % rank}
    if target is aten.matmul.default:
        return {first: dim} if dim == rank - 2 and len(shape_of(first)) == rank else None
    if target is _ATTENTION:
        return _of_attention(node, dim)
    return None


def _broadcast(node: fx.Node, dim: int) -> dict[fx.Node, int]:
    found = {}
    for source in node.all_input_nodes:
        own = dim - len(shape_of(node)) + len(shape_of(source))
        if own >= 0 and shape_of(source)[own] > 1:
            found[source] = own
    return found


def _of_attention(node: fx.Node, dim: int) -> dict[fx.Node, int] | None:
    query: Any = node.args[0]
    rank = len(shape_of(node))
    causal = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False)
    if dim != rank - 2 or causal or query in node.args[1:3]:
        return None
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if isinstance(mask, fx.Node) and len(shape_of(mask)) > 1 and shape_of(mask)[-2] > 1:
        return {query: dim, mask: len(shape_of(mask)) - 2}
    return {query: dim}


def _copy_narrowed(
    graph: fx.Graph, node: fx.Node, needs: dict[fx.Node, Rows], small: dict[fx.Node, fx.Node]
) -> fx.Node:
    rows = needs[node]
    sources = _sources(node, rows.dim)
    assert sources is not None

    def given(source: fx.Node) -> fx.Node:
        if source not in sources:
            return source
        want = replace(rows, dim=sources[source])
        if needs.get(source) == want:
            return small[source]
        return graph.call_function(aten.slice.Tensor, (source, want.dim, want.start, want.start + want.length))

    with graph.inserting_before(node):
        copied = graph.node_copy(node, _once(given))
        if node.target in _SHAPED:
            shape = [*shape_of(node)]
            shape[rows.dim] = rows.length
            copied.target, copied.args, copied.kwargs = aten.reshape.default, (copied.args[0], shape), {}
    return copied


def _once(function: Callable[[fx.Node], fx.Node]) -> Callable[[fx.Node], fx.Node]:
    """The same answer for the same node."""
    answers: dict[fx.Node, fx.Node] = {}

    def answer(node: fx.Node) -> fx.Node:
        if node not in answers:
            answers[node] = function(node)
        return answers[node]

    return answer


class _Watch(TorchFunctionMode):
    """Whether a module attends, and selects from what has at least three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = self.selects = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch."""
        del types
        result = func(*args, **(kwargs or {}))
        self.attends |= func in (F.scaled_dot_product_attention, torch.softmax, F.softmax, Tensor.softmax)
        selects = func in (Tensor.__getitem__, torch.select, Tensor.select)
        self.selects |= selects and isinstance(args[0], Tensor) and args[0].ndim > 2 and args[0].is_floating_point()
        return result

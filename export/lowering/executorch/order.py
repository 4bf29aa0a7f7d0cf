"""The instructions of a program in an order that keeps little alive at a time.

A trace computes the forward pass, then the gradients from the last layer to the first, but what is traced in between
(windows of an input, say) stands where it was first needed by anybody. Three orders are simulated: the given one, the
one that takes whatever frees the most, and the given one with everything as late as it can be. The one whose worst
moment holds the fewest bytes is kept. The same inside of a partition, where it is XNNPACK's workspace.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from edgetrain.export.lowering.executorch.pieces import is_piece
from edgetrain.export.lowering.executorch.subgraph import operands, tensor_of
from edgetrain.export.lowering.executorch.turns import VIEW

aten = torch.ops.aten

# What takes no memory of its own.
_ATEN_VIEWS = {
    aten.view.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.t.default,
}  # fmt: skip


@dataclass
class _Unit:
    """One instruction with what only unpacks its results."""

    nodes: list[Any]
    # Units whose results it reads.
    sources: set[int] = field(default_factory=set)
    users: set[int] = field(default_factory=set)
    # Memory that it reads or writes, by what first made it.
    storages: set[Any] = field(default_factory=set)
    made: set[Any] = field(default_factory=set)


def most_alive(graph: fx.Graph, sources: Iterable[fx.Node]) -> int:
    """Bytes alive at the worst moment of a graph that was rewritten and not delegated yet, in the best order.

    Only what is computed from the sources counts.
    """
    units, sizes, kept = _units(graph, _ATEN_VIEWS)
    reached = set(sources)
    for node in graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    sizes = {node: size if node in reached else 0 for node, size in sizes.items()}
    return _worst(units, _best(units, sizes, kept), sizes, kept)


def put_in_order(module: fx.GraphModule) -> None:
    """Reorders the nodes of an edge program, in place."""
    units, sizes, kept = _units(module.graph, {VIEW})
    best = _best(units, sizes, kept)
    if best == list(range(len(units))):
        return
    output = module.graph.output_node()
    for index in best:
        for node in units[index].nodes:
            output.prepend(node)
    module.graph.lint()
    module.recompile()


def put_inside_in_order(graph: Any) -> None:
    """Reorders the nodes of an XNNPACK subgraph, an `XNNGraph` of ExecuTorch's, in place.

    A partition comes breadth first: whatever can be computed from its inputs alone comes before all else.
    """
    nodes = [node.xnode_union for node in graph.xnodes]
    maker = {number: index for index, node in enumerate(nodes) for number in operands(node, "output").values()}
    sizes = dict.fromkeys(maker, 0)
    for tensor in map(tensor_of, graph.xvalues):
        # What leaves the subgraph is not in its workspace.
        if tensor.id_out in sizes and tensor.id_out not in graph.output_ids:
            sizes[tensor.id_out] = math.prod(tensor.dims)
    units = [_Unit([node]) for node in graph.xnodes]
    for index, node in enumerate(nodes):
        units[index].made.update(operands(node, "output").values())
        for number in operands(node).values():
            if number in maker:
                units[index].storages.add(number)
                if maker[number] != index:
                    units[index].sources.add(maker[number])
                    units[maker[number]].users.add(index)
    graph.xnodes = [node for index in _best(units, sizes, set()) for node in units[index].nodes]


def _best(units: Sequence[_Unit], sizes: dict[Any, int], kept: set[Any]) -> list[int]:
    """The candidate whose worst moment holds least; the given order if none is better."""
    candidates = [list(range(len(units))), _freeing_most(units, sizes, kept), _as_late_as_possible(units)]
    return min(candidates, key=lambda order: _worst(units, order, sizes, kept))


def _units(graph: fx.Graph, views: Collection[Any]) -> tuple[list[_Unit], dict[fx.Node, int], set[fx.Node]]:
    """The instructions, the bytes of every memory that they make, and what must stay until the end."""
    units: list[_Unit] = []
    unit_of: dict[fx.Node, int] = {}
    storage_of: dict[fx.Node, fx.Node] = {}
    sizes: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and node.args[0] in unit_of:
            index = unit_of[node.args[0]]
            units[index].nodes.append(node)
        else:
            index = len(units)
            units.append(_Unit([node]))
            for source in node.all_input_nodes:
                if source in unit_of:
                    units[index].sources.add(unit_of[source])
                    units[unit_of[source]].users.add(index)
                if source in storage_of:
                    units[index].storages.add(storage_of[source])
        unit_of[node] = index
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        # Its result is the memory of its argument.
        base = node.args[0] if node.target in views or is_piece(node) else None
        if isinstance(base, fx.Node):
            if base in storage_of:
                storage_of[node] = storage_of[base]
            continue
        storage_of[node] = node
        sizes[node] = _bytes(value)
        units[index].made.add(node)
        units[index].storages.add(node)
    results: Any = graph.output_node().args[0]
    return units, sizes, {storage_of[node] for node in results if node in storage_of}


def _bytes(value: Tensor) -> int:
    return math.prod(value.shape) * value.element_size()


def _readers(units: Sequence[_Unit]) -> dict[Any, set[int]]:
    readers: dict[Any, set[int]] = {}
    for index, unit in enumerate(units):
        for storage in unit.storages:
            readers.setdefault(storage, set()).add(index)
    return readers


def _worst(units: Sequence[_Unit], order: Sequence[int], sizes: dict[Any, int], kept: set[Any]) -> int:
    """Bytes alive at the worst moment of an order."""
    left = {storage: len(readers) for storage, readers in _readers(units).items()}
    alive = worst = 0
    for index in order:
        unit = units[index]
        alive += sum(sizes[storage] for storage in unit.made)
        worst = max(worst, alive)
        for storage in unit.storages:
            left[storage] -= 1
            if left[storage] == 0 and storage not in kept:
                alive -= sizes[storage]
    return worst


def _freeing_most(units: Sequence[_Unit], sizes: dict[Any, int], kept: set[Any]) -> list[int]:
    """Of what can run next, always what grows the memory least."""
    left = {storage: len(readers) for storage, readers in _readers(units).items()}
    waiting = [len(unit.sources) for unit in units]
    ready = {index for index, count in enumerate(waiting) if count == 0}
    order: list[int] = []

    def growth(index: int) -> tuple[int, int]:
        unit = units[index]
        made = sum(sizes[storage] for storage in unit.made)
        freed = sum(sizes[s] for s in unit.storages if left[s] == 1 and s not in kept)
        return made - freed, index

    while ready:
        index = min(ready, key=growth)
        ready.remove(index)
        order.append(index)
        for storage in units[index].storages:
            left[storage] -= 1
        for user in units[index].users:
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.add(user)
    return order


def _as_late_as_possible(units: Sequence[_Unit]) -> list[int]:
    """The given order from the end: each instruction just before the first that reads its result."""
    rank = list(range(len(units)))
    for index in reversed(range(len(units))):
        rank[index] = min((rank[user] for user in units[index].users), default=index)
    waiting = [len(unit.users) for unit in units]
    ready = [(-rank[index], -index) for index, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = -heapq.heappop(ready)[1]
        order.append(index)
        for source in units[index].sources:
            waiting[source] -= 1
            if waiting[source] == 0:
                heapq.heappush(ready, (-rank[source], -source))
    return order[::-1]

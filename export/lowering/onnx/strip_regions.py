"""Finds where a graph's activations are wide, and what connects them: the regions of `strips`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Smaller tensors are in the cache anyway.
MIN_BYTES = 1 << 19
STRIP_BYTES = 1 << 18
# Narrower products are slow.
MIN_COLUMNS = 64
# Weights are copied into strips; that many sweeps pay for it.
MIN_SWEEPS = 3

_ELEMENTWISE = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default),
    *(aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.neg.default, aten.pow.Tensor_Scalar),
    *(aten.sigmoid.default, aten.tanh.default, aten.erf.default, aten.exp.default, aten.log.default),
    *(aten.relu.default, aten.clamp.default, aten.hardtanh.default, aten.sqrt.default, aten.rsqrt.default),
    *(aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.bitwise_and.Tensor, aten.where.self),
    *(aten.logical_and.default, aten._to_copy.default, aten.reciprocal.default, aten.abs.default),  # noqa: SLF001
}
PRODUCTS = {aten.mm.default, aten.addmm.default}


@dataclass(eq=False)
class Region:
    """Connected elementwise operators, with the products before and after them."""

    rows: int
    columns: int
    # In the graph's order by segment: sources, operators, and sinks.
    segments: dict[int, list[fx.Node]] = field(default_factory=dict)
    # How they read their strips.
    sinks: dict[fx.Node, str] = field(default_factory=dict)
    sweeps: int = 0
    refused: bool = False

    def add(self, node: fx.Node, level: int) -> None:
        """Adds a member."""
        self.segments.setdefault(level, []).append(node)

    @property
    def pays(self) -> bool:
        """Whether it has a backward part, and enough sweeps. What is frozen keeps its weights in one piece."""
        sweeping = [any(node.target in _ELEMENTWISE for node in nodes) for nodes in self.segments.values()]
        return not self.refused and sum(sweeping) > 1 and self.sweeps >= MIN_SWEEPS and self.strips > 1

    @property
    def strips(self) -> int:
        """How many; 1 if it is not worth it or does not come out even."""
        wanted = -(-4 * self.rows * self.columns // STRIP_BYTES)
        for count in range(wanted, self.columns // MIN_COLUMNS + 1):
            if self.columns % (16 * count) == 0:
                return count
        return 1


class Regions:
    """Which nodes of a graph belong to which region."""

    def __init__(self, graph: fx.Graph) -> None:
        # Reshaped, or computed again, it is the same strip.
        self.same: dict[fx.Node, fx.Node] = {}
        self.transposed: dict[fx.Node, fx.Node] = {}
        self._region: dict[fx.Node, Region] = {}
        self._merged: dict[Region, Region] = {}
        self._computed: dict[tuple[Any, ...], fx.Node] = {}
        # How many whole results of regions lie before a node: its segment.
        self.level: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op != "placeholder":
                self._visit(node)
        for node in graph.nodes:
            levels = (self.level[value] + self._is_sink(value) for value in node.all_input_nodes)
            self.level[node] = max(levels, default=0)
            if (region := self.region(node)) is not None:
                region.add(node, self.level[node])

    def any(self) -> bool:
        """Whether a region is worth it."""
        return any(self._root(region).pays for region in self._region.values())

    def region(self, node: fx.Node) -> Region | None:
        """Of a member or sink."""
        region = self._region.get(node)
        return None if region is None else self._root(region)

    def paying(self, node: fx.Node) -> Region | None:
        """Of a member, a sink or another form of one, if it is in strips."""
        region = self._of(node)
        return region if region is not None and region.pays else None

    def _of(self, node: fx.Node) -> Region | None:
        return self.region(self.same.get(node, self.transposed.get(node, node)))

    def _is_sink(self, node: fx.Node) -> bool:
        region = self.region(node)
        return region is not None and node in region.sinks

    def _root(self, region: Region) -> Region:
        while region in self._merged:
            region = self._merged[region]
        return region

    def _strip_of(self, value: Any) -> fx.Node | None:
        """The member that a value is."""
        if not isinstance(value, fx.Node):
            return None
        value = self.same.get(value, value)
        region = self.region(value)
        return value if region is not None and value not in region.sinks else None

    def _visit(self, node: fx.Node) -> None:
        members = [self._strip_of(value) for value in node.all_input_nodes]
        if not any(members) and not any(value in self.transposed for value in node.all_input_nodes):
            if node.target in PRODUCTS and _is_wide(node):
                self._region[node] = Region(*node.meta["val"].shape)
        elif not self._joins(node):
            for value in node.all_input_nodes:
                member = self._strip_of(value) or self.transposed.get(value)
                if member is not None:
                    self._root(self._region[member]).refused = True

    def _joins(self, node: fx.Node) -> bool:
        """Takes a reader of members into their region."""
        first = arguments(node)[0] if node.args else None
        member = self._strip_of(first)
        if member is not None and node.target is aten.reshape.default and _columns(node) == _columns(first):
            self.same[node] = member
            return True
        if member is not None and is_turn(node):
            self.transposed[node] = member
            return True
        if node.target in _ELEMENTWISE:
            return self._joins_sweep(node)
        kind = self._sink(node)
        if kind is None:
            return False
        found = (self._strip_of(value) or self.transposed.get(value) for value in node.all_input_nodes)
        region = self.region(next(filter(None, found)))
        assert region is not None
        self._region[node] = region
        region.sinks[node] = kind
        return True

    def _joins_sweep(self, node: fx.Node) -> bool:
        tensors = [(value, self._strip_of(value)) for value in node.all_input_nodes]
        if any(member is None and not _is_number(value) for value, member in tensors):
            return False
        regions = {region for _, member in tensors if member is not None and (region := self.region(member))}
        if len({(region.rows, region.columns) for region in regions}) > 1:
            return False
        canonical = fx.node.map_arg((node.args, node.kwargs), lambda value: self.same.get(value, value))
        key = (node.target, str(canonical))
        if key in self._computed:
            self.same[node] = self._computed[key]
            return True
        self._computed[key] = node
        target, *others = regions
        for other in others:
            self._merged[other] = target
            target.sinks |= other.sinks
            target.sweeps += other.sweeps
            target.refused |= other.refused
        target.sweeps += 1
        self._region[node] = target
        return True

    def _sink(self, node: fx.Node) -> str | None:
        """How a product or a sum reads the only member among its operands."""
        if node.target is aten.sum.dim_IntList:
            value, dims, *_ = arguments(node)
            size = value.meta["val"].ndim
            return "sum" if self._strip_of(value) and [d % size for d in dims] == [*range(size - 1)] else None
        if node.target not in PRODUCTS:
            return None
        *added, left, right = arguments(node)
        if any(self._strip_of(value) or value in self.transposed for value in added):
            return None
        if self._strip_of(right):
            whole = self._strip_of(left) is None and left not in self.transposed
            return "columns" if whole and not added else None
        if right in self.transposed:
            return None
        if left in self.transposed:
            return None if added else "rows"
        return "added"


def is_turn(node: fx.Node) -> bool:
    """Whether it is a matrix transposed."""
    return node.target is aten.permute.default and node.args[1] == [1, 0]


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Of a call; which they are, its operator says."""
    return node.args


def _is_wide(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.nbytes > MIN_BYTES


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.target is aten.scalar_tensor.default or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _columns(node: Any) -> int:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.ndim else 0

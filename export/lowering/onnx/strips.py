"""Wide activations in strips of columns, each small enough to stay in a processor's cache.

Onnxruntime runs one operator after the other over whole tensors. Between the two linear layers of a Transformer's
block, forward and backward, that is a dozen sweeps over the widest tensor of the model, each from memory and back. In
strips, every sweep finds what the one before it wrote: less than half of the time for 8x64x512 on a core with 2 MB.

A region is what elementwise operators connect: from products that make wide matrices,

    x B + b      in strips: of the columns of B and b

to those that read them, and to sums over rows:

    h B          the sum over strips of h and rows of B, each product adding to the one before
    h' B         strips beside each other, along rows
    A h, sum h   the same, along columns

A region's forward and backward part are segments of it: what lies between them needs whole results. Regions that are
read in another way are left as they are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edgetrain.export.graph.nodes import call
from edgetrain.export.lowering.onnx.strip_regions import PRODUCTS, Region, Regions, arguments, is_turn

aten = torch.ops.aten


def in_strips(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its wide regions in strips; the same module if there are none."""
    found = Regions(module.graph)
    if not found.any():
        return module
    return fx.GraphModule(module, _Writer(module.graph, found).write())


class _Writer:
    """Copies a graph, with regions in strips, one strip after the other."""

    def __init__(self, graph: fx.Graph, found: Regions) -> None:
        self._old = graph
        self._found = found
        self._new = fx.Graph()
        self._whole: dict[fx.Node, fx.Node] = {}
        self._strips: dict[tuple[fx.Node, int], fx.Node] = {}
        self._parts: dict[tuple[fx.Node, int, int], fx.Node] = {}
        self._apart: dict[fx.Node, fx.Node] = {}
        self._level = found.level
        self._written: set[tuple[Region, int]] = set()

    def write(self) -> fx.Graph:
        """The new graph."""
        for node in self._old.nodes:
            if self._found.paying(node) is None:
                self._copy(node)
        return self._new

    def _copy(self, node: fx.Node) -> fx.Node:
        """A whole value in the new graph."""
        if node not in self._whole:
            region = self._found.paying(node)
            if region is None:
                for value in node.all_input_nodes:
                    self._copy(value)
                self._whole[node] = self._new.node_copy(node, self._whole.__getitem__)
            else:
                self._write_segment(region, self._level[node])
        return self._whole[node]

    def _write_segment(self, region: Region, level: int) -> None:
        if (region, level) in self._written:
            return
        self._written.add((region, level))
        members = region.segments[level]
        for node in members:
            for value in node.all_input_nodes:
                before = self._found.paying(value)
                if before is not region:
                    self._copy(value)
                elif self._level[value] < level:
                    self._write_segment(region, self._level[value])
        collected: dict[fx.Node, list[fx.Node]] = {node: [] for node in members if node in region.sinks}
        count = region.strips
        for strip in range(count):
            for node in members:
                if node not in region.sinks:
                    self._strips[node, strip] = self._strip(node, strip, count)
                    self._strips[node, strip].meta["val"] = torch.empty(
                        region.rows, region.columns // count, dtype=node.meta["val"].dtype, device="meta"
                    )
                elif region.sinks[node] == "added":
                    done = collected[node]
                    collected[node] = [self._added(node, strip, count, done[0] if done else None)]
                else:
                    collected[node].append(self._beside(node, region.sinks[node], strip))
        for node, parts in collected.items():
            if region.sinks[node] == "added":
                self._whole[node] = parts[0]
            else:
                dim = 0 if region.sinks[node] == "rows" else node.meta["val"].ndim - 1
                self._whole[node] = self._call(aten.cat.default, parts, dim)

    def _strip(self, node: fx.Node, strip: int, count: int) -> fx.Node:
        if node.target not in PRODUCTS:
            return self._new.node_copy(node, lambda value: self._value(value, strip))
        *added, left, right = arguments(node)
        bias = [self._part(value, value.meta["val"].ndim - 1, strip, count) for value in added]
        weight = self._part(right, 1, strip, count)
        if is_turn(weight) and len(bias) == 1 and not node.kwargs:
            return self._call(aten.linear.default, self._whole[left], arguments(weight)[0], bias[0])
        return self._call(node.target, *bias, self._whole[left], weight, **node.kwargs)

    def _added(self, node: fx.Node, strip: int, count: int, before: fx.Node | None) -> fx.Node:
        *added, left, right = arguments(node)
        operands = self._value(left, strip), self._part(right, 0, strip, count)
        if before is not None:
            return self._call(aten.addmm.default, before, *operands, **_factor(node, "alpha"))
        return self._call(node.target, *(self._whole[value] for value in added), *operands, **node.kwargs)

    def _beside(self, node: fx.Node, kind: str, strip: int) -> fx.Node:
        if kind == "sum":
            keep = bool(arguments(node)[2]) if len(node.args) > 2 else False
            total = self._call(aten.sum.dim_IntList, self._value(arguments(node)[0], strip), [0], keep, **node.kwargs)
            shape = [*node.meta["val"].shape[:-1], -1]
            return total if len(shape) <= 2 else self._call(aten.reshape.default, total, shape)
        left, right = arguments(node)
        if kind == "rows":
            turned = self._call(aten.permute.default, self._strips[self._found.transposed[left], strip], [1, 0])
            return self._call(node.target, turned, self._whole[right])
        return self._call(node.target, self._turned(left), self._value(right, strip))

    def _turned(self, value: fx.Node) -> fx.Node:
        """An operand of all strips, its transposition done once and not within every product.

        As one of three dimensions onnxruntime does not make it a part of the products.
        """
        if not is_turn(value):
            return self._whole[value]
        if value not in self._apart:
            rows, columns = value.meta["val"].shape
            deep = self._call(aten.reshape.default, self._whole[arguments(value)[0]], [columns, rows, 1])
            turned = self._call(aten.permute.default, deep, [1, 0, 2])
            self._apart[value] = self._call(aten.reshape.default, turned, [rows, columns])
        return self._apart[value]

    def _value(self, value: fx.Node, strip: int) -> fx.Node:
        """An operand: a strip, or what is whole and small."""
        value = self._found.same.get(value, value)
        return self._strips[value, strip] if (value, strip) in self._strips else self._whole[value]

    def _part(self, value: fx.Node, dim: int, strip: int, count: int) -> fx.Node:
        """Equal parts of a weight or bias."""
        turns = 0
        while is_turn(value):
            value, turns = arguments(value)[0], turns + 1
        if turns % 2:
            return self._call(aten.permute.default, self._part(value, 1 - dim, strip, count), [1, 0])
        self._copy(value)
        size = value.meta["val"].shape[dim]
        if size == 1:
            return self._whole[value]
        key = value, dim, count
        if key not in self._parts:
            self._parts[key] = self._call(
                aten.split_with_sizes.default, self._whole[value], [size // count] * count, dim
            )
        return self._call(operator.getitem, self._parts[key], strip)

    def _call(self, target: Any, *operands: Any, **options: Any) -> fx.Node:
        return call(self._new, target, *operands, **options)


def _factor(node: fx.Node, name: str) -> dict[str, Any]:
    return {name: node.kwargs[name]} if name in node.kwargs else {}

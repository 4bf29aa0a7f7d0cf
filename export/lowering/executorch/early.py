"""What the backward pass derives from the forward pass alone is computed there, if less has to be kept for it.

The slope of GELU is made of the activation, the gate and a square: tensors that would wait for the gradient, where the
slope is one, and is quicker to compute while they are in the processor's cache. ExecuTorch's partitioner computes
everything in the partition that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from executorch.exir.dialects._ops import ops
from torch import Tensor, fx

from edgetrain.export.lowering.executorch.turns import VIEW

_DEQUANTIZE = ops.edge.quantized_decomposed.dequantize_per_tensor.default


def compute_early(nodes: Sequence[fx.Node], partitions: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """Which nodes had better be computed by another partition, the one that all they depend on comes from.

    Args:
        nodes: of a graph, in order.
        partitions: the partition of every node that has one.
    """
    memory: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.args[0] if node.target == VIEW else None
        memory[node] = memory[source] if isinstance(source, fx.Node) else node
    moved: dict[fx.Node, str] = {}
    for group in _groups(_origins(nodes, partitions), partitions):
        origin = next(iter(group.values()))
        read = {memory[source] for member in group for source in member.all_input_nodes}
        read_elsewhere = {
            memory[source]
            for node in nodes
            if node not in group and partitions.get(node) != origin
            for source in node.all_input_nodes
        }
        freed = {base for base in read - read_elsewhere if partitions.get(base) == origin}
        if _bytes({memory[node] for node in group} & read_elsewhere) < _bytes(freed):
            moved |= group
    return moved


def _origins(nodes: Iterable[fx.Node], partitions: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """The nodes that depend on results of one other partition alone, and on which."""
    origins: dict[fx.Node, str] = {}
    # At hand before any partition runs.
    early: set[fx.Node] = set()
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source not in early]
        if not sources and node not in partitions:
            early.add(node)
        found = {origins.get(source, partitions.get(source)) for source in sources}
        origin = found.pop() if len(found) == 1 else None
        # What has become larger again would wait so.
        if node in partitions and origin not in (None, partitions[node]) and node.target != _DEQUANTIZE:
            origins[node] = str(origin)
    return origins


def _groups(origins: Mapping[fx.Node, str], partitions: Mapping[fx.Node, str]) -> list[dict[fx.Node, str]]:
    """Nodes that read one another, of one partition and of one origin."""
    groups: list[dict[fx.Node, str]] = []
    for node, origin in origins.items():
        group = {node: origin}
        apart = []
        for other in groups:
            first = next(iter(other))
            alike = other[first] == origin and partitions[first] == partitions[node]
            if alike and not other.keys().isdisjoint(node.all_input_nodes):
                group = other | group
            else:
                apart.append(other)
        groups = [*apart, group]
    return groups


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return sum(value.nbytes for node in nodes if isinstance(value := node.meta.get("val"), Tensor))

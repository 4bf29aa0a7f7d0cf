"""The traced step cut in two: `trunk`, which no trainable parameter influences, and the rest, trained on its outputs.

A node belongs to the trunk if it depends on the batch's inputs and on no parameter, target or weight, so that its
value for a sample is the same in every epoch and can be kept. Where to cut is a minimum cut (Ford and Fulkerson
1956) of a graph in which

- a value that crosses costs its bytes; the inputs themselves cost nothing, since whoever trains has them;
- an operation that the head does, too or instead, costs its floating operations, at `FLOPS_PER_BYTE`: without that,
  token ids would always be the fewest bytes, and the frozen layers would run again in every step.

So among the places where the expensive part is left behind, the one with the fewest bytes wins: the one tensor that
enters a residual block rather than the ten slices of it that the block begins with. Of cuts that cost the same the
one with the larger trunk is taken.

Pure functions on the graph, whatever runtime it was traced for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy.typing as npt
import torch
from torch import Tensor, fx

from edgetrain.export.batch import tensor_spec
from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.protocol.graph_names import FEATURE, GRADIENT, PARAMETER

# Reading a byte back from a flash disk (100 MB/s) takes as long as so many operations of a small core (10 GFLOP/s).
FLOPS_PER_BYTE = 100.0
# A trunk with less than this share of the step's operations is not worth a second program.
MIN_SHARE = 0.1
# A feature that should not depend on the other samples of the batch may move by rounding only.
_SEPARABLE = 1e-4

aten = torch.ops.aten
# Operator -> which argument holds the dimension that is summed over, last.
_PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.linear.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
_DTYPES = (torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Split:
    """A step in parts: `step` = `head_step` of `trunk`."""

    # Inputs: those leaves of the batch's inputs that it reads. Outputs: `features.0`, `features.1`, …
    trunk: TracedGraph
    # Inputs: the parameters, the features, further leaves of the batch, the weights. Outputs: those of `step`.
    head_step: TracedGraph
    # The same without gradients.
    head_eval: TracedGraph
    # Share of the step's floating operations that the trunk does.
    share: float
    # Bytes that cross for one sample.
    bytes_per_sample: int


def split_step(step: TracedGraph, *, num_parameters: int, inputs: Sequence[str], micro_batch: int) -> Split | None:
    """Cuts a traced training step.

    Args:
        step: as `joint.trace_step` gives it.
        num_parameters: how many of its inputs, the first ones, learn.
        inputs: names of the leaves of the batch's inputs.
        micro_batch: size of dimension 0 of the batch.

    Returns:
        The parts; or None if nothing is frozen that is worth it, or if the samples of a batch influence each other
        there, so that no sample's features could be kept.
    """
    graph = step.module.graph
    with torch.no_grad():
        _Shapes(step.module).run(*step.example)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = {
        node: spec
        for node, spec in zip(placeholders[num_parameters:], step.inputs[num_parameters:], strict=True)
        if spec.name in inputs
    }
    frozen = _frozen(graph, placeholders, set(leaves))
    features = _cheapest_cut(graph, frozen, set(leaves), micro_batch)
    if not features:
        return None
    values = dict(zip(placeholders, step.example, strict=True))
    trunk = _trunk(step, features, leaves, values)
    if not _separable(trunk, micro_batch):
        return None
    head = _head(step, features, trunk, values)
    if step.first is not None:
        trace = step.first

        def first(samples: int) -> TracedGraph:
            parts = split_step(trace(samples), num_parameters=num_parameters, inputs=inputs, micro_batch=samples)
            if parts is None:
                raise UnsupportedError(f"the step of {samples} samples has no head")
            return parts.head_step

        head = replace(head, first=first)
    below = [node for node in _ancestors(features) if node in frozen]
    operations = sum(flops(node) for node in graph.nodes)
    share = sum(flops(node) for node in below) / max(operations, 1)
    if share < MIN_SHARE:
        return None
    crossing = sum(spec.nbytes for spec in trunk.outputs)
    return Split(trunk, head, _without_gradients(head), share, crossing // micro_batch)


def with_features(head: TracedGraph, features: Sequence[npt.NDArray[Any]]) -> TracedGraph:
    """A head whose example holds these features."""
    given = iter(features)
    example = tuple(
        torch.from_numpy(next(given).copy()) if spec.name.startswith(FEATURE) else tensor
        for spec, tensor in zip(head.inputs, head.example, strict=True)
    )
    return replace(head, example=example)


class _Shapes(fx.Interpreter):
    """Notes the shape and dtype of every value, of constants too, which a trace leaves out."""

    def run_node(self, n: fx.Node) -> Any:
        """One node, computed."""
        value = super().run_node(n)
        n.meta["val"] = torch.empty_like(value, device="meta") if isinstance(value, Tensor) else None
        return value


def flops(node: fx.Node) -> float:
    """Floating operations of one node; a copy of a value counts as one for each element."""
    if node.op != "call_function":
        return 0.0
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0.0
    if node.target in _PRODUCTS:
        return 2.0 * value.numel() * _value(node.args[_PRODUCTS[node.target]]).shape[-1]
    if node.target is aten.convolution.default:
        x, weight, transposed = _value(node.args[0]), _value(node.args[1]), node.args[6]
        places = x.numel() / x.shape[1] if transposed else value.numel() / value.shape[1]
        return 2.0 * places * weight.numel()
    return float(value.numel())


def _value(node: Any) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _frozen(graph: fx.Graph, placeholders: Sequence[fx.Node], leaves: set[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on an input leaf and on no other placeholder."""
    moving = set(placeholders) - leaves
    found = set(leaves)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in moving for source in node.all_input_nodes):
            moving.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _cheapest_cut(graph: fx.Graph, frozen: set[fx.Node], leaves: set[fx.Node], micro_batch: int) -> list[fx.Node]:
    """The nodes whose values cross, without the leaves, in the graph's order.

    Every frozen node is two: "kept" is on the head's side if the head needs its value, "made" is there too if the head
    computes it again. The edges run from the head to the trunk, so that what is reached from the head is as little as
    can be.
    """
    flow = nx.DiGraph()
    flow.add_nodes_from(("head", "trunk"))
    for node in frozen:
        made, kept = (node, "made"), (node, "kept")
        price = 0.0 if node in leaves else _bytes(node, micro_batch)
        flow.add_edge(kept, made, **({} if math.isinf(price) else {"capacity": price}))
        if node not in leaves:
            flow.add_edge(made, "trunk", capacity=flops(node) / FLOPS_PER_BYTE)
        for user in node.users:
            if user in frozen:
                flow.add_edge((user, "made"), kept)
            else:
                flow.add_edge("head", kept)
    if flow.out_degree("head") == 0:
        return []
    _, (head, _) = nx.minimum_cut(flow, "head", "trunk")
    return [
        node
        for node in graph.nodes
        if node in frozen and node not in leaves and (node, "kept") in head and (node, "made") not in head
    ]


def _bytes(node: fx.Node, micro_batch: int) -> float:
    """What one micro-batch of a value takes; infinite if it cannot be kept sample by sample."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != micro_batch or value.dtype not in _DTYPES:
        return math.inf
    return float(value.numel() * value.element_size())


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _trunk(
    step: TracedGraph, features: Sequence[fx.Node], leaves: dict[fx.Node, Any], values: dict[fx.Node, Tensor]
) -> TracedGraph:
    needed = _ancestors(features)
    taken = [node for node in leaves if node in needed]
    module = _extract(step.module, taken, features)
    example = tuple(values[node] for node in taken)
    with torch.no_grad():
        outputs = module(*example)
    return TracedGraph(
        name="trunk",
        module=module,
        inputs=tuple(leaves[node] for node in taken),
        outputs=tuple(tensor_spec(f"{FEATURE}{index}", value) for index, value in enumerate(outputs)),
        example=example,
    )


def _head(
    step: TracedGraph, features: Sequence[fx.Node], trunk: TracedGraph, values: dict[fx.Node, Tensor]
) -> TracedGraph:
    placeholders = list(values)
    count = sum(spec.name.startswith(PARAMETER) for spec in step.inputs)
    results = _results(step.module.graph)
    needed = _reached(results, set(features))
    with torch.no_grad():
        computed = trunk.module(*trunk.example)
    specs = dict(zip(placeholders, step.inputs, strict=True))
    further = [node for node in placeholders[count:] if node in needed]
    given = [*placeholders[:count], *features, *further]
    known = {**values, **dict(zip(features, computed, strict=True))}
    named = {**specs, **dict(zip(features, trunk.outputs, strict=True))}
    return TracedGraph(
        name="head_step",
        module=_extract(step.module, given, results),
        inputs=tuple(named[node] for node in given),
        outputs=step.outputs,
        example=tuple(known[node] for node in given),
    )


def _results(graph: fx.Graph) -> list[fx.Node]:
    results: Any = graph.output_node().args[0]
    return list(results)


def _reached(results: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [] if node in stop else node.all_input_nodes
    return found


def _without_gradients(head: TracedGraph) -> TracedGraph:
    """The head's sums alone, with the same inputs but for leaves that only gradients need."""
    kept = [index for index, spec in enumerate(head.outputs) if not spec.name.startswith(GRADIENT)]
    every = _results(head.module.graph)
    results = [every[index] for index in kept]
    placeholders = [node for node in head.module.graph.nodes if node.op == "placeholder"]
    module = _extract(head.module, placeholders, results)
    outputs = tuple(head.outputs[index] for index in kept)
    return replace(head, name="head_eval", module=module, outputs=outputs, first=None)


def _extract(module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a graph between `inputs`, which become its placeholders, and `outputs`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"arg_{index}")
        copies[node].meta["val"] = node.meta["val"]
    needed = _reached(outputs, set(inputs))
    for node in module.graph.nodes:
        if node in needed and node not in copies and node.op in ("call_function", "get_attr"):
            copies[node] = graph.node_copy(node, _lookup(copies))
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(module, graph)


def _lookup(copies: dict[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: copies[node]


def _separable(trunk: TracedGraph, micro_batch: int) -> bool:
    """Whether a sample's features stay the same in a batch that holds nothing else."""
    with torch.no_grad():
        expected = trunk.module(*trunk.example)
        for row in {0, micro_batch - 1}:
            alone = trunk.module(*(leaf[row : row + 1].expand_as(leaf).contiguous() for leaf in trunk.example))
            for one, whole in zip(alone, expected, strict=True):
                difference = (one[row].double() - whole[row].double()).abs().max()
                if not difference <= _SEPARABLE * max(float(whole[row].double().abs().max()), 1e-6):
                    return False
    return True

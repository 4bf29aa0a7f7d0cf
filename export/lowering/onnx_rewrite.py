"""What is changed in a traced graph because onnxruntime is slow with it as it is."""

from __future__ import annotations

import copy

import torch
from torch import fx

aten = torch.ops.aten

# exp(-60) = 9e-27: nothing beside a sum of at least 1, and far from denormal numbers.
_MASKED = 60.0


def for_onnxruntime(module: fx.GraphModule) -> fx.GraphModule:
    """The graph rewritten; shares its tensors with the given one, which stays as it is."""
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in list(module.graph.nodes):
        if node.target is aten._softmax.default:  # noqa: SLF001
            _raise_masks(module.graph, node)
    module.recompile()
    return module


def _raise_masks(graph: fx.Graph, softmax: fx.Node) -> None:
    """Raises attention scores to `_MASKED` below the row's largest.

    The exponentials of a mask are denormal numbers, with which onnxruntime's softmax takes ten times as long. Rows that
    are masked whole stay NaN.
    """
    scores, dim, _ = softmax.args
    assert isinstance(scores, fx.Node)
    value = softmax.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim < 3:
        return
    with graph.inserting_before(softmax):
        largest = graph.call_function(aten.amax.default, (scores, [dim], True))
        lowest = graph.call_function(aten.sub.Tensor, (largest, _MASKED))
        softmax.replace_input_with(scores, graph.call_function(aten.maximum.default, (scores, lowest)))

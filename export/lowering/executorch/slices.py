"""A large step, taken apart by samples: the program computes one slice of the micro-batch at a time and adds up.

All that a step gives are sums over samples. So a slice needs only what its own backward pass waits for, a part of the
arena, and that part stays in the processor's cache. Programs are the same from outside; the instructions of a slice
stand in them as often as there are slices (`unroll.py`), partitions and constants once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, fx

from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.executorch.diagnosis import differs
from edgetrain.export.lowering.executorch.order import most_alive
from edgetrain.protocol.graph_names import GRADIENT, PARAMETER

logger = logging.getLogger(__name__)

# Bytes that may be alive at once before a step is taken apart: a few times what a processor's second cache holds.
LARGE = 6 << 20
# Each slice reads and writes the sums of the gradients; what it keeps alive must be so many times as large.
OUTWEIGHS = 4


@dataclass(frozen=True)
class Slices:
    """A step of several slices."""

    count: int
    # The inputs that have a row for each sample.
    inputs: tuple[int, ...]

    def added_up(self, function: Callable[..., Sequence[Tensor]]) -> Callable[..., list[Tensor]]:
        """The function of a whole micro-batch that a function of one slice makes."""

        def whole(*inputs: Tensor) -> list[Tensor]:
            parts = [
                function(
                    *(tensor.chunk(self.count)[i] if k in self.inputs else tensor for k, tensor in enumerate(inputs))
                )
                for i in range(self.count)
            ]
            return [sum(column[1:], start=column[0]) for column in zip(*parts, strict=True)]

        return whole


def slices_for(graph: TracedGraph, rewritten: fx.GraphModule) -> Slices | None:
    """How a step is best taken apart; None if it is not worth it.

    Args:
        graph: the step, as it was traced.
        rewritten: the same in XNNPACK's operators.
    """
    if graph.first is None:
        return None
    inputs = tuple(i for i, spec in enumerate(graph.inputs) if not spec.name.startswith(PARAMETER))
    samples = graph.example[inputs[0]].shape[0]
    gradients = sum(spec.nbytes for spec in graph.outputs if spec.name.startswith(GRADIENT))
    # What is frozen keeps nothing for the backward pass.
    placeholders = [node for node in rewritten.graph.nodes if node.op == "placeholder"]
    learn = [node for i, node in enumerate(placeholders) if i not in inputs]
    alive, count = most_alive(rewritten.graph, learn), 1
    while alive > LARGE * count and alive > OUTWEIGHS * gradients * 2 * count and samples % (2 * count) == 0:
        count *= 2
    return Slices(count, inputs) if count > 1 else None


def first_slice(graph: TracedGraph, slices: Slices) -> TracedGraph | None:
    """The step of the first slice; None if the module cannot be called with fewer samples, or is not a sum over them.

    Args:
        graph: the step of the whole micro-batch.
        slices: how it is taken apart.
    """
    assert graph.first is not None, "only a step that can be traced again has slices"
    samples = graph.example[slices.inputs[0]].shape[0] // slices.count
    try:
        with torch.enable_grad():
            first = graph.first(samples)
    except Exception as error:  # noqa: BLE001 - the user's code with a batch that it did not ask for
        logger.debug(f"the step is not traced for {samples} samples: {error}")
        return None
    wanted = [
        msgspec.structs.replace(spec, shape=(samples, *spec.shape[1:])) if i in slices.inputs else spec
        for i, spec in enumerate(graph.inputs)
    ]
    if list(first.inputs) != wanted or first.outputs != graph.outputs:
        return None
    expected, got = graph.module(*graph.example), slices.added_up(first.module)(*graph.example)
    if any(differs(sum_, value) for sum_, value in zip(got, expected, strict=True)):
        logger.debug(f"the step of {samples} samples is no part of the whole one")
        return None
    return first

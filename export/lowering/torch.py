"""Graphs as torch's own exported programs, for the reference runtime."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from edgetrain.export.graph.decompositions import Decompositions
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.exported import exported


class TorchLowering:
    """See `edgetrain.export.lowering.base.Lowering`."""

    runtime = "torch"
    # The format of an exported program is promised from one version on to later ones.
    minimum_version = ".".join(torch.__version__.split(".")[:2])
    # The reference computes everything.
    narrows = False
    splits = True

    def available(self) -> str | None:
        """Always: exporting needs torch anyway."""
        return None

    def decompositions(self) -> Decompositions:
        """None: torch has a kernel for every operator."""
        return {}

    def lower(self, graph: TracedGraph) -> LoweredGraph:
        """Saves the graph as `torch.export` does."""
        with torch.no_grad():
            program = exported(graph.module, graph.example)
        # They would be saved too, as large as the parameters.
        program.example_inputs = None
        # Where a node came from: addresses of this process, so that no two exports would be alike.
        for node in program.graph.nodes:
            node.meta.pop("from_node", None)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return LoweredGraph(file=f"{graph.name}.pt2", data=buffer.getvalue())

    def load(self, lowered: LoweredGraph) -> Run:
        """Reads the program back."""
        module = torch.export.load(io.BytesIO(lowered.data)).module()

        def run(arrays: Sequence[Array]) -> list[Array]:
            with torch.no_grad():
                results = module(*(torch.from_numpy(array) for array in arrays))
            return [result.numpy() for result in results]

        return run

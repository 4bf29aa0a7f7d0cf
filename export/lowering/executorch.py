"""Graphs to ExecuTorch programs (.pte) on XNNPACK."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from edgetrain.export.decompositions import Decompositions
from edgetrain.export.errors import UnsupportedError
from edgetrain.export.joint import TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.executorch_decompositions import decompositions
from edgetrain.export.lowering.executorch_rewrite import rewrite

VERSION = "1.5"


class ExecutorchLowering:
    """See `edgetrain.export.lowering.base.Lowering`."""

    runtime = "executorch"
    minimum_version = VERSION

    def available(self) -> str | None:
        """None, or what to install."""
        try:
            found = version("executorch")
        except PackageNotFoundError:
            return "executorch is not installed: pip install 'edgetrain[export]'"
        if not found.startswith(f"{VERSION}.") or importlib.util.find_spec("executorch.exir") is None:
            return f"export needs executorch {VERSION} whole, here is {found}: pip install 'executorch~={VERSION}.0'"
        return None

    def decompositions(self) -> Decompositions:
        """Forms that XNNPACK runs."""
        return decompositions()

    def lower(self, graph: TracedGraph) -> LoweredGraph:
        """Rewrites for XNNPACK, delegates what it takes, and plans the memory of the rest."""
        # A dimension of size 1 may have any stride; ExecuTorch would take some for channels-last.
        example = tuple(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in graph.example)
        graph = replace(graph, example=example)
        with _quiet(), torch.no_grad():
            data, planned = _compile(rewrite(graph), graph)
        return LoweredGraph(file=f"{graph.name}.pte", data=data, planned_memory=planned)

    def load(self, lowered: LoweredGraph) -> Run:
        """ExecuTorch's own bindings."""
        with _quiet():
            from executorch.extension.pybindings.portable_lib import (  # noqa: PLC0415
                _load_for_executorch_from_buffer,
            )

            # The module reads from the buffer for as long as it lives, and does not hold it.
            data = lowered.data
            module = _load_for_executorch_from_buffer(data)

        def run(arrays: Sequence[Array]) -> list[Array]:
            assert data
            outputs = module.run_method("forward", [torch.from_numpy(array) for array in arrays])
            return [np.asarray(output) for output in outputs]

        return run


def _compile(module: torch.fx.GraphModule, graph: TracedGraph) -> tuple[bytes, int]:
    from executorch.exir import (  # noqa: PLC0415
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass  # noqa: PLC0415

    from edgetrain.export.lowering.executorch_partition import partitioner  # noqa: PLC0415

    exported = torch.export.export(module, graph.example, strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    # Inputs and outputs are the caller's memory.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    try:
        program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    except RuntimeError as error:
        missing = re.search(r"Missing out variants: (.*)", str(error))
        if missing:
            raise UnsupportedError(
                f"executorch: graph {graph.name!r} uses {missing[1]}, which ExecuTorch has no kernel for. "
                "Freeze the modules around it or write them with other operators"
            ) from error
        raise
    return program.buffer, _planned_memory(program)


def _planned_memory(program: Any) -> int:
    """Bytes of all arenas of the program's one method."""
    plan = program.executorch_program.execution_plan[0]
    return int(sum(plan.non_const_buffer_sizes))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress notes and deprecation warnings of the exporters; their errors are exceptions."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)

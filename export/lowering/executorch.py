"""Graphs to ExecuTorch programs (.pte) on XNNPACK."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.traceback import NodeSource

from edgetrain.export.decompositions import Decompositions
from edgetrain.export.errors import OperatorError
from edgetrain.export.joint import TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.executorch_decompositions import decompositions
from edgetrain.export.lowering.executorch_diagnosis import differs, wrong_operator
from edgetrain.export.lowering.executorch_rewrite import rewrite
from edgetrain.export.quiet import quiet

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
        """Rewrites for XNNPACK, delegates what it takes, plans the memory of the rest, and tries it.

        Raises:
            OperatorError: no kernel, or one that computes other numbers than torch.
        """
        # A dimension of size 1 may have any stride; ExecuTorch would take some for channels-last.
        example = tuple(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in graph.example)
        with quiet(), _without_history(), torch.no_grad():
            module = rewrite(replace(graph, example=example))
            data, planned = _compile(module, example)
            self._prove(graph.module, module, example, data)
        return LoweredGraph(file=f"{graph.name}.pte", data=data, planned_memory=planned)

    def load(self, lowered: LoweredGraph) -> Run:
        """ExecuTorch's own bindings."""
        run_tensors = _load(lowered.data)

        def run(arrays: Sequence[Array]) -> list[Array]:
            outputs = run_tensors([torch.from_numpy(array) for array in arrays])
            return [np.asarray(output) for output in outputs]

        return run

    def _prove(self, traced: fx.GraphModule, rewritten: fx.GraphModule, example: Sequence[Tensor], data: bytes) -> None:
        expected = traced(*example)
        run = _load(data)
        run(example)
        # The second run works in memory that the first has used, as every later one will.
        got = run(example)
        if not any(differs(result, value) for result, value in zip(got, expected, strict=True)):
            return

        def compile_(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
            return _load(_compile(module, tuple(inputs))[0])

        operator = wrong_operator(rewritten, example, compile_)
        if operator is not None:
            raise OperatorError(operator, f"the kernel of executorch {version('executorch')} gives wrong numbers")


def _load(data: bytes) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    with quiet():
        from executorch.extension.pybindings.portable_lib import (  # noqa: PLC0415
            _load_for_executorch_from_buffer,
        )

        module = _load_for_executorch_from_buffer(data)

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        # The module reads from the bytes for as long as it lives, and does not hold them.
        assert data
        outputs: Sequence[Tensor] = module.run_method("forward", list(tensors))
        return outputs

    return run


def _compile(module: fx.GraphModule, example: tuple[Tensor, ...]) -> tuple[bytes, int]:
    """The program, and the bytes that it plans."""
    from executorch.exir import (  # noqa: PLC0415
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass  # noqa: PLC0415

    from edgetrain.export.lowering.executorch_partition import partitioner  # noqa: PLC0415

    exported = torch.export.export(module, example, strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    # Inputs are the caller's memory. So would be outputs, but the stock Module of phone apps cannot say where.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=True)
    try:
        program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    except RuntimeError as error:
        missing = re.search(r"Missing out variants: \W*([\w:.]+)", str(error))
        if missing:
            raise OperatorError(missing[1], "ExecuTorch has no kernel for it") from error
        raise
    plan = program.executorch_program.execution_plan[0]
    _check_kernels(plan)
    return program.buffer, sum(plan.non_const_buffer_sizes)


def _check_kernels(plan: Any) -> None:
    from executorch.extension.pybindings.portable_lib import _get_operator_names  # noqa: PLC0415

    known = set(_get_operator_names())
    for operator in plan.operators:
        name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        if name not in known:
            raise OperatorError(name, "ExecuTorch has no kernel for it")


@contextmanager
def _without_history() -> Iterator[None]:
    """Nodes do not remember what they were made from: copying that over dozens of passes takes longest of all."""
    original = NodeSource.__init__

    def forget(self: NodeSource, *_args: Any, **_options: Any) -> None:
        self.pass_name, self.action, self.from_node = "", [], []
        self.node_info = self._dict = self._action_string = None

    NodeSource.__init__ = forget  # type: ignore[method-assign]
    try:
        yield
    finally:
        NodeSource.__init__ = original  # type: ignore[method-assign]

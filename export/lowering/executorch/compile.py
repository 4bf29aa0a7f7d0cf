"""A rewritten graph to the bytes of a program: delegated, put in order, its memory planned, its kernels checked."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from edgetrain.export.errors import OperatorError, UnsupportedError
from edgetrain.export.lowering.exported import exported

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """One program."""

    data: bytes
    # Bytes that it plans for one call. What XNNPACK takes for itself comes on top.
    planned: int
    # External tensors by file name without its ending, if any.
    external: dict[str, bytes]


def compile_module(module: fx.GraphModule, example: tuple[Tensor, ...]) -> Compiled:
    """The program of a graph.

    Raises:
        OperatorError: ExecuTorch has no kernel for it.
    """
    return emit(delegate(module, example))


def delegate(module: fx.GraphModule, example: tuple[Tensor, ...], *, held_inputs: bool = False) -> Any:
    """ExecuTorch's edge program with all that XNNPACK takes given to it.

    Args:
        module: a rewritten graph.
        example: its inputs.
        held_inputs: some of them will be held by the program.
    """
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform  # noqa: PLC0415
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # noqa: PLC0415

    from edgetrain.export.lowering.executorch.order import put_in_order  # noqa: PLC0415
    from edgetrain.export.lowering.executorch.partition import partitioner  # noqa: PLC0415
    from edgetrain.export.lowering.executorch.peephole import peephole  # noqa: PLC0415
    from edgetrain.export.lowering.executorch.settle import settle_shapes  # noqa: PLC0415
    from edgetrain.export.lowering.executorch.turns import simplify_turns, view_for_each  # noqa: PLC0415

    try:
        with peephole():
            edge = to_edge_transform_and_lower(
                exported(module, example),
                # Every edge tensor is row-major, so copies change nothing. XNNPACK drops them from a partition after it
                # was cut: if what is copied is read outside too, one tensor would leave it twice, which it refuses.
                transform_passes=[
                    RemoveCloneOpsTransform(preserve_input_output_copies=True),
                    simplify_turns,
                    settle_shapes,
                    view_for_each,
                ],
                partitioner=[partitioner(held_inputs=held_inputs)],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
    except RuntimeError as error:
        raise UnsupportedError(
            f"ExecuTorch cannot lower this graph: {error} Export for onnxruntime, or let less of the model learn"
        ) from error
    put_in_order(edge.exported_program().graph_module)
    return edge


def emit(edge: Any, *, external_weights: bool = False) -> Compiled:
    """The bytes of an edge program.

    Args:
        edge: as `delegate` gives it.
        external_weights: parameters that have a gradient go to a file of their own.

    Raises:
        OperatorError: ExecuTorch has no kernel for it.
    """
    from executorch.exir import ExecutorchBackendConfig  # noqa: PLC0415

    from edgetrain.export.lowering.executorch.memory import Planning  # noqa: PLC0415

    config = ExecutorchBackendConfig(
        memory_planning_pass=Planning(held_inputs=external_weights), external_mutable_weights=external_weights
    )
    try:
        program = edge.to_executorch(config)
    except RuntimeError as error:
        missing = re.search(r"Missing out variants: \W*([\w:.]+)", str(error))
        if missing:
            raise OperatorError(missing[1], "ExecuTorch has no kernel for it") from error
        raise
    plan = program.executorch_program.execution_plan[0]
    _check_kernels(plan)
    external = {name: bytes(data) for name, data in program._tensor_data.items()}  # noqa: SLF001
    return Compiled(program.buffer, sum(plan.non_const_buffer_sizes), external)


def _check_kernels(plan: Any) -> None:
    from executorch.extension.pybindings.portable_lib import _get_operator_names  # noqa: PLC0415

    known = set(_get_operator_names())
    for operator in plan.operators:
        name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        if name not in known:
            raise OperatorError(name, "ExecuTorch has no kernel for it")

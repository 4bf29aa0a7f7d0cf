"""The step for ExecuTorch's own TrainingModule: parameters inside the program, their values in a file beside it.

What `torch.export`'s joint graphs promise is only a signature: which inputs are parameters, which outputs are their
gradients. So our step gets that signature after it was delegated; XNNPACK has taken the parameters for inputs by then
and will not fold them into constants. ExecuTorch plans memory for them, fills it from the `.ptd` file when the
program is loaded, and returns it as further outputs, for an optimizer to write to.

TrainingModule of ExecuTorch 1.5 (`extension/training`): `forward_backward`, `named_gradients`, `named_parameters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec

from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.executorch.compile import delegate, emit
from edgetrain.protocol.graph_names import GRADIENT, PARAMETER

NAME = "training_module"
PROGRAM, DATA = f"{NAME}.pte", f"{NAME}.ptd"


def named(step: TracedGraph) -> TracedGraph:
    """The step under this graph's name."""
    return replace(step, name=NAME)


def lower(module: fx.GraphModule, example: tuple[Tensor, ...], graph: TracedGraph) -> LoweredGraph:
    """The program and its parameters' initial values.

    Args:
        module: the rewritten step.
        example: its inputs.
        graph: the traced step, whose names it takes.
    """
    edge = delegate(module, example, held_inputs=True)
    program = edge.exported_program()
    parameters = _sign(program, graph)
    program._state_dict.update(zip(parameters, example, strict=False))  # noqa: SLF001
    compiled = emit(edge, external_weights=True)
    (data,) = compiled.external.values()
    return LoweredGraph(
        file=PROGRAM,
        data=compiled.data,
        extra={DATA: data},
        planned_memory=compiled.planned,
        inputs=graph.inputs[len(parameters) :],
    )


def _sign(program: Any, graph: TracedGraph) -> list[str]:
    """Declares parameters and gradients, in place. Returns the parameters' names, in order."""
    signature = program.graph_signature
    names = [spec.name.removeprefix(PARAMETER) for spec in graph.inputs if spec.name.startswith(PARAMETER)]
    waiting = iter(names)
    for index, spec in enumerate(signature.input_specs):
        if spec.kind is InputKind.USER_INPUT and (name := next(waiting, None)) is not None:
            signature.input_specs[index] = InputSpec(InputKind.PARAMETER, spec.arg, name)
    for index, (spec, result) in enumerate(zip(signature.output_specs, graph.outputs, strict=True)):
        if result.name.startswith(GRADIENT):
            target = result.name.removeprefix(GRADIENT)
            signature.output_specs[index] = OutputSpec(OutputKind.GRADIENT_TO_PARAMETER, spec.arg, target)
    return names


def load(lowered: LoweredGraph) -> Run:
    """Runs it as an app would, through ExecuTorch's TrainingModule: writes the parameters, then calls it."""
    from executorch.extension.pybindings.portable_lib import (  # noqa: PLC0415
        _load_for_executorch_from_buffer,
    )
    from executorch.extension.training import TrainingModule  # noqa: PLC0415

    data, values = lowered.data, lowered.extra[DATA]
    module = TrainingModule(_load_for_executorch_from_buffer(data, values))
    parameters: list[Tensor] = []

    def run(arrays: Sequence[Array]) -> list[Array]:
        # The module reads from the bytes for as long as it lives, and does not hold them.
        assert data
        assert values
        tensors = [torch.from_numpy(array) for array in arrays]
        if not parameters:
            # The first call tells where they are; it takes the batch alone, whose length it does not say.
            parameters.extend(_known(module, tensors))
        for mine, given in zip(parameters, tensors, strict=False):
            mine.copy_(given)
        outputs = module.forward_backward("forward", tensors[len(parameters) :])
        gradients = module.named_gradients()
        order = module.named_parameters()
        return [np.asarray(value) for value in (*outputs, *(gradients[name] for name in order))]

    return run


def _known(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    names = module.model.run_method(module.fqn_method_prefix + "forward", ())
    module.forward_backward("forward", list(tensors[len(names) :]))
    return list(module.named_parameters().values())

"""Graphs to ExecuTorch programs (.pte) on XNNPACK."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx

from edgetrain.export.errors import OperatorError, UnsupportedError
from edgetrain.export.graph.decompositions import Decompositions
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.graph.partition import Split
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.executorch import training_module
from edgetrain.export.lowering.executorch.compile import Compiled, compile_module
from edgetrain.export.lowering.executorch.decompositions import decompositions
from edgetrain.export.lowering.executorch.diagnosis import check_integers, differs, wrong_operator
from edgetrain.export.lowering.executorch.quicker import quicker
from edgetrain.export.lowering.executorch.rewrite import contiguous, rewrite
from edgetrain.export.quiet import quiet

logger = logging.getLogger(__name__)

VERSION = "1.5"
STYLES = ("functional", "training-module")


class ExecutorchLowering:
    """See `edgetrain.export.lowering.base`.

    Args:
        style: "functional"; with "training-module" a program for ExecuTorch's own TrainingModule is added.
    """

    runtime = "executorch"
    minimum_version = VERSION
    narrows = True
    splits = True

    def __init__(self, style: str = "functional") -> None:
        if style not in STYLES:
            raise UnsupportedError(f"there is no executorch style {style!r}, only: {', '.join(STYLES)}")
        self._style = style

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
        graph = contiguous(graph)
        with quiet(), quicker(), torch.no_grad():
            module = rewrite(graph)
            if graph.name == training_module.NAME:
                return training_module.lower(module, graph.example, graph)
            compiled = self._in_slices(graph, module) or self._whole(graph, module)
        return LoweredGraph(file=f"{graph.name}.pte", data=compiled.data, planned_memory=compiled.planned)

    def load(self, lowered: LoweredGraph) -> Run:
        """ExecuTorch's own bindings."""
        if lowered.file == training_module.PROGRAM:
            with quiet():
                return training_module.load(lowered)
        run_tensors = _load(lowered.data)

        def run(arrays: Sequence[Array]) -> list[Array]:
            outputs = run_tensors([torch.from_numpy(array) for array in arrays])
            return [np.asarray(output) for output in outputs]

        return run

    def further_graphs(self, step: TracedGraph) -> tuple[TracedGraph, ...]:
        """What is made of the step beside it."""
        return (training_module.named(step),) if self._style == "training-module" else ()

    def cannot_store(self, kind: str) -> str | None:
        """Anything but a trunk in integers whose ranges are known."""
        if kind == "int8-static":
            return None
        return (
            "XNNPACK multiplies float32 activations with float32 weights only, and its integers want ranges known "
            "beforehand: use int8-static"
        )

    def weights(self, kind: str) -> Literal["float32"]:
        """Constants of XNNPACK's float32 operators are float32: nothing is rounded outside a quantized trunk."""
        del kind
        return "float32"

    def stored_as(self, names: Sequence[str], kind: str, parts: Split | None) -> dict[str, str]:
        """The weights of the trunk's layers."""
        from edgetrain.export.lowering.executorch.quantize import in_layers  # noqa: PLC0415  # slow to import

        del kind
        assert parts is not None, "nothing but a trunk is quantized"
        return dict.fromkeys(in_layers(names, parts), "int8")

    def store(self, lowered: LoweredGraph, kind: str) -> LoweredGraph:
        """As it is."""
        del kind
        return lowered

    def quantize_trunk(
        self, trunk: TracedGraph, lowered: LoweredGraph, kind: str, batches: Sequence[Sequence[Array]]
    ) -> LoweredGraph:
        """The trunk in int8 arithmetic; see `executorch.quantize`.

        Raises:
            UnsupportedError: it has no layer that can be quantized, or XNNPACK's integers are not torch's.
        """
        from edgetrain.export.lowering.executorch.quantize import quantized_module  # noqa: PLC0415  # slow to import

        del lowered
        assert kind == "int8-static"
        trunk = contiguous(trunk)
        tensors = [[torch.from_numpy(array) for array in batch] for batch in batches]
        with quiet(), quicker(), torch.no_grad():
            module = quantized_module(trunk, tensors)
            if module is None:
                raise UnsupportedError(
                    "the trunk has no convolution and no linear layer: int8-static would change nothing, leave it out"
                )
            compiled = compile_module(module, trunk.example)
            check_integers(trunk.module(*trunk.example), module(*trunk.example), _load(compiled.data)(trunk.example))
        return LoweredGraph(file=f"{trunk.name}.pte", data=compiled.data, planned_memory=compiled.planned)

    def _whole(self, graph: TracedGraph, module: fx.GraphModule) -> Compiled:
        compiled = compile_module(module, graph.example)
        # On the kink of a relu, what was traced and what it was rewritten to may already differ in torch.
        if not _computes(compiled.data, graph.example, graph.module, module):
            _find_wrong_operator(module, graph.example)
        return compiled

    def _in_slices(self, graph: TracedGraph, module: fx.GraphModule) -> Compiled | None:
        """A few samples at a time, if the step is large and can be taken apart."""
        from edgetrain.export.lowering.executorch.slices import first_slice, slices_for  # noqa: PLC0415

        slices = slices_for(graph, module)
        first = None if slices is None else first_slice(graph, slices)
        if slices is None or first is None:
            return None
        from edgetrain.export.lowering.executorch.unroll import unroll  # noqa: PLC0415  # slow to import

        first = contiguous(first)
        module = rewrite(first)
        compiled = unroll(compile_module(module, first.example), slices)
        if compiled is None:
            return None
        if not _computes(compiled.data, graph.example, graph.module, slices.added_up(module)):
            _find_wrong_operator(module, first.example)
        logger.info(
            f"executorch: {graph.name} in {slices.count} slices of its samples, {compiled.planned:,} bytes planned"
        )
        return compiled


def _computes(data: bytes, example: Sequence[Tensor], *functions: Callable[..., Sequence[Tensor]]) -> bool:
    """Whether a program gives what one of the functions gives."""
    run = _load(data)
    run(example)
    # The second run works in memory that the first has used, as every later one will.
    got = run(example)
    return any(
        not any(differs(result, value) for result, value in zip(got, function(*example), strict=True))
        for function in functions
    )


def _find_wrong_operator(module: fx.GraphModule, example: Sequence[Tensor]) -> None:
    def compile_(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        return _load(compile_module(module, tuple(inputs)).data)

    operator = wrong_operator(module, example, compile_)
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

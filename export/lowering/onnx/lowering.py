"""Graphs to plain ONNX, for the ordinary onnxruntime (and for onnxruntime-web)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx

from edgetrain.export.errors import OperatorError, UnsupportedError
from edgetrain.export.graph.decompositions import Decompositions
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.graph.partition import Split
from edgetrain.export.lowering.base import Array, LoweredGraph, Run, Weights
from edgetrain.export.lowering.exported import exported
from edgetrain.export.lowering.onnx.decompositions import for_onnx
from edgetrain.export.lowering.onnx.quantize import quantize_trunk
from edgetrain.export.lowering.onnx.quicker import quicker
from edgetrain.export.lowering.onnx.rewrite import for_onnxruntime
from edgetrain.export.lowering.onnx.store import store
from edgetrain.export.quiet import quiet

OPSET = 18
# Protobuf's limit for one message; larger models would need external data.
MAX_MODEL_BYTES = 2**31 - 1


class OnnxLowering:
    """See `edgetrain.export.lowering.base.Lowering`.

    Args:
        rewrite: what is changed in a traced graph for the runtime's sake.
    """

    runtime = "onnxruntime"
    minimum_version = "1.22"
    narrows = True
    splits = True

    def __init__(self, rewrite: Callable[[fx.GraphModule], fx.GraphModule] = for_onnxruntime) -> None:
        self._rewrite = rewrite

    def available(self) -> str | None:
        """None, or what to install."""
        for package in ("onnxruntime", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install 'edgetrain[export]'"
        return None

    def decompositions(self) -> Decompositions:
        """What ONNX has no operator for."""
        return for_onnx()

    def lower(self, graph: TracedGraph) -> LoweredGraph:
        """Translates by torch's own exporter, then strips what ties the file to this machine."""
        try:
            program = _export(graph, self._rewrite(graph.module))
        except Exception as error:
            raise _operator_error(error) from error
        model = program.model_proto
        _strip(model)
        if model.ByteSize() > MAX_MODEL_BYTES:
            raise UnsupportedError(f"graph {graph.name!r} is larger than the 2 GiB that one ONNX file can hold")
        return LoweredGraph(file=f"{graph.name}.onnx", data=model.SerializeToString(deterministic=True))

    def cannot_store(self, kind: str) -> None:
        """Whatever is asked for."""
        del kind

    def weights(self, kind: str) -> Weights:
        """Whatever is asked for; a quantized trunk's neighbours are stored as int8."""
        return "float16" if kind == "float16" else "int8"

    def stored_as(self, names: Sequence[str], kind: str, parts: Split | None) -> dict[str, str]:
        """All of them, in whichever part."""
        del parts
        return dict.fromkeys(names, self.weights(kind))

    def store(self, lowered: LoweredGraph, kind: str) -> LoweredGraph:
        """Initializers that are widened when the program is loaded."""
        return replace(lowered, data=store(lowered.data, kind))

    def quantize_trunk(
        self, trunk: TracedGraph, lowered: LoweredGraph, kind: str, batches: Sequence[Sequence[Array]]
    ) -> LoweredGraph:
        """By onnxruntime's own tools; see `edgetrain.export.lowering.onnx.quantize`."""
        del trunk
        return replace(lowered, data=quantize_trunk(lowered.data, kind, batches))

    def load(self, lowered: LoweredGraph) -> Run:
        """An ordinary inference session."""
        import onnxruntime  # noqa: PLC0415  # slow to import, and needed only here

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(lowered.data, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

        def run(arrays: Sequence[Array]) -> list[Array]:
            return [np.asarray(a) for a in session.run(None, dict(zip(names, arrays, strict=True)))]

        return run


def _export(graph: TracedGraph, module: fx.GraphModule) -> torch.onnx.ONNXProgram:
    from onnxscript import optimizer  # noqa: PLC0415  # slow to import, and needed only here

    with quiet(), quicker(), torch.no_grad():
        program = torch.onnx.export(
            exported(module, graph.example),
            (),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            external_data=False,
            optimize=False,
            custom_translation_table=_translations(),
        )
        assert program is not None
        # Shapes are static and known, so one round without inference leaves nothing but a few identities.
        optimizer.optimize_ir(program.model, num_iterations=1, onnx_shape_inference=False)
        return program


def _operator_error(error: BaseException) -> OperatorError:
    """Finds the operator in the chain of exceptions that torch's exporter raises."""
    chain: list[str] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(f"{type(link).__name__}: {link}")
        link = link.__cause__ or link.__context__
    found = re.search(r"target=torch\.ops\.([\w.]+)", "\n".join(reversed(chain)))
    last = chain[-1].strip().splitlines()[0][:300]
    return OperatorError(found.group(1) if found else "an unnamed operator", last)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX for operators that torch's exporter reaches but does not know."""
    from onnxscript import opset18 as op  # noqa: PLC0415  # slow to import, and needed only here

    def prod(inp: Any, dims: Sequence[int], **_options: Any) -> Any:
        return op.ReduceProd(inp, op.Constant(value_ints=list(dims)), keepdims=0)

    return {torch.ops.prims.prod.default: prod}


def _strip(model: onnx.ModelProto) -> None:
    """Removes stack traces and paths of the exporting machine."""
    model.doc_string = ""
    model.producer_name, model.producer_version = "edgetrain", ""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in graph.value_info:
            del value.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]

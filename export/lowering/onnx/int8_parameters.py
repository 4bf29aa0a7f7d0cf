"""Programs that take trainable weights as whole numbers and scales, and widen them.

The float32 graph is lowered as ever. Then the input of each such parameter becomes two, int8 [O, ...] and float32
scales [O], and every operation that reads it gets a DequantizeLinear of its own, so that no more than one weight at a
time is float32. The gradients stay those with respect to the widened weight.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import onnx
from onnx import helper

from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.onnx.lowering import OnnxLowering
from edgetrain.protocol.graph_names import PARAMETER, SCALE
from edgetrain.protocol.int8 import nearest
from edgetrain.protocol.manifest import TensorSpec


class Int8Lowering(OnnxLowering):
    """As for onnxruntime, with graphs that take some parameters in int8.

    Args:
        names: of these parameters.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names

    def lower(self, graph: TracedGraph) -> LoweredGraph:
        """One graph with other inputs."""
        lowered = super().lower(graph)
        data = _with_int8_inputs(lowered.data, self._names)
        return replace(lowered, data=data, inputs=_int8_inputs(graph.inputs, self._names))

    def load(self, lowered: LoweredGraph) -> Run:
        """Takes the float32 parameters of the traced graph, which int8 must be able to hold."""
        run = super().load(lowered)
        assert lowered.inputs is not None, "lowered here"
        parameters = [spec for spec in lowered.inputs if spec.name.startswith(PARAMETER)]

        def widened(arrays: Sequence[Array]) -> list[Array]:
            given: list[Array] = list(arrays[: len(parameters)])
            scales: list[Array] = []
            for index, spec in enumerate(parameters):
                if spec.dtype == "int8":
                    given[index], scale = nearest(given[index].astype(np.float32))
                    scales.append(scale.ravel())
            return run([*given, *scales, *arrays[len(parameters) :]])

        return widened


def _with_int8_inputs(data: bytes, names: Collection[str]) -> bytes:
    """An ONNX model that takes these parameters as whole numbers and, behind all parameters, their scales."""
    model = onnx.load_from_string(data)
    graph = model.graph
    scales: list[onnx.ValueInfoProto] = []
    for value in graph.input:
        name = value.name.removeprefix(PARAMETER)
        if value.name.startswith(PARAMETER) and name in names:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
            rows = value.type.tensor_type.shape.dim[0].dim_value
            scales.append(helper.make_tensor_value_info(SCALE + name, onnx.TensorProto.FLOAT, [rows]))
    if not scales:
        return data
    count = sum(value.name.startswith(PARAMETER) for value in graph.input)
    inputs = list(graph.input)
    del graph.input[:]
    graph.input.extend([*inputs[:count], *scales, *inputs[count:]])
    scaled = {value.name.removeprefix(SCALE) for value in scales}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for place, read in enumerate(node.input):
            name = read.removeprefix(PARAMETER)
            if read.startswith(PARAMETER) and name in scaled:
                node.input[place] = f"wide.{len(nodes)}.{name}"
                given = [read, SCALE + name]
                nodes.append(helper.make_node("DequantizeLinear", given, [node.input[place]], axis=0))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    changed: bytes = model.SerializeToString(deterministic=True)
    return changed


def _int8_inputs(inputs: Sequence[TensorSpec], names: Collection[str]) -> tuple[TensorSpec, ...]:
    """The inputs of a float32 graph as they are with these parameters in int8."""
    parameters, scales, rest = [], [], []
    for spec in inputs:
        name = spec.name.removeprefix(PARAMETER)
        if not spec.name.startswith(PARAMETER):
            rest.append(spec)
        elif name in names:
            parameters.append(msgspec.structs.replace(spec, dtype="int8"))
            scales.append(TensorSpec(name=SCALE + name, dtype="float32", shape=spec.shape[:1]))
        else:
            parameters.append(spec)
    return (*parameters, *scales, *rest)

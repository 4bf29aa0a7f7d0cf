"""Trainable weights in int8: programs that take whole numbers and scales, and widen them.

The float32 graph is traced and lowered as ever. Then the input of each such parameter becomes two, int8 [O, ...] and
float32 scales [O], and every operation that reads it gets a DequantizeLinear of its own, so that no more than one
weight at a time is float32. The gradients stay those with respect to the widened weight. So what eager torch computes
at weights that int8 can hold is what the program must give, and the ordinary proof covers it: its points are rounded.
How such weights learn is the device's affair (`edgetrain.edge_client.runtimes.int8_parameters`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import onnx
import torch
from onnx import helper

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph.joint import Problem, TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.onnx import OnnxLowering
from edgetrain.export.prepare import plain_math
from edgetrain.export.storage.calibration import Batch
from edgetrain.export.storage.frozen_weights import Storage, is_weight
from edgetrain.protocol.int8 import nearest
from edgetrain.protocol.manifest import TensorSpec, TrainableStorage

_PARAMETER, _SCALES = "parameters.", "scales."


def in_int8(problem: Problem, storage: Storage, calibration: Sequence[Batch]) -> tuple[Problem, TrainableStorage]:
    """The problem with its large weights rounded and named as kept in int8, and what that brings and costs.

    Raises:
        UnsupportedError: none of them is large enough to be worth it.
        ToleranceError: rounding changes the loss on the calibration data by more than is allowed.
    """
    trainable = problem.prepared.trainable
    names = frozenset(name for name, tensor in trainable.items() if is_weight(tensor))
    if not names:
        raise UnsupportedError(
            "nothing that learns is worth int8: that takes matrices and kernels of 256 elements or more. Leave out "
            "--trainable-storage, or let more learn"
        )
    named = replace(problem, int8=names)
    values = dict(zip(trainable, named.representable(problem.parameters), strict=True))
    rounded = replace(named, prepared=replace(problem.prepared, trainable=values))
    before, after = _mean_loss(problem, calibration), _mean_loss(rounded, calibration)
    storage.check_loss("trainable weights as int8", before, after, "Keep them in float32, or allow more")
    sizes = {name: (tensor.numel(), tensor.shape[0]) for name, tensor in trainable.items()}
    return rounded, TrainableStorage(
        kind="int8",
        bytes_before=sum(4 * count for count, _ in sizes.values()),
        bytes_after=sum(count + 4 * rows if name in names else 4 * count for name, (count, rows) in sizes.items()),
        calibration_samples=len(calibration) * problem.example.micro_batch,
        loss_before=before,
        loss_after=after,
    )


def _mean_loss(problem: Problem, batches: Sequence[Batch]) -> float:
    """Of eager torch at the initial parameters."""
    losses = weights = 0.0
    with plain_math(problem.prepared.module), torch.no_grad():
        for batch in batches:
            found = problem.evaluate(problem.parameters, batch, torch.ones_like(problem.weights))
            losses += float((found.losses * found.weights).sum())
            weights += float(found.weights.sum())
    return losses / weights if weights else losses


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
        parameters = [spec for spec in lowered.inputs if spec.name.startswith(_PARAMETER)]

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
        name = value.name.removeprefix(_PARAMETER)
        if value.name.startswith(_PARAMETER) and name in names:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
            rows = value.type.tensor_type.shape.dim[0].dim_value
            scales.append(helper.make_tensor_value_info(_SCALES + name, onnx.TensorProto.FLOAT, [rows]))
    if not scales:
        return data
    count = sum(value.name.startswith(_PARAMETER) for value in graph.input)
    inputs = list(graph.input)
    del graph.input[:]
    graph.input.extend([*inputs[:count], *scales, *inputs[count:]])
    scaled = {value.name.removeprefix(_SCALES) for value in scales}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for place, read in enumerate(node.input):
            name = read.removeprefix(_PARAMETER)
            if read.startswith(_PARAMETER) and name in scaled:
                node.input[place] = f"wide.{len(nodes)}.{name}"
                given = [read, _SCALES + name]
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
        name = spec.name.removeprefix(_PARAMETER)
        if not spec.name.startswith(_PARAMETER):
            rest.append(spec)
        elif name in names:
            parameters.append(msgspec.structs.replace(spec, dtype="int8"))
            scales.append(TensorSpec(name=_SCALES + name, dtype="float32", shape=spec.shape[:1]))
        else:
            parameters.append(spec)
    return (*parameters, *scales, *rest)

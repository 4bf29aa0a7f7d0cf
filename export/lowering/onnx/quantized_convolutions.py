"""Quantized convolutions in one node each, as onnxruntime makes them when it loads a model: a third of the text.

What `quantize_static` writes for a convolution is DequantizeLinear three times, Conv, and QuantizeLinear. QLinearConv
is all of that. Its scales are kept in float16, its biases as float16 multiples of 64 units of the int32 accumulator.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetrain.export.lowering.onnx.halves import Halves, in_half

Array = npt.NDArray[np.generic]

# A bias of up to 4 million units.
_UNITS = 64.0
_ZERO = "weight.zero"


def fuse_convolutions(model: onnx.ModelProto) -> None:
    """Changes a quantized model in place."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [onnx.NodeProto()] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    scales, biases = Halves("scales"), Halves("biases", whole=True)
    new: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for node in graph.node:
        after = readers.get(node.output[0], [])
        if node.op_type != "Conv" or len(after) != 1 or after[0].op_type != "QuantizeLinear":
            continue
        before = [makers.get(name) for name in node.input]
        if any(maker is None or maker.op_type != "DequantizeLinear" for maker in before):
            continue
        x, weight, *rest = (list(maker.input) for maker in before if maker is not None)
        values = constants.get(weight[0])
        if values is None or values.dtype != np.int8 or any(len(part) < 3 for part in (x, weight, after[0].input)):
            continue
        bias = [_moved(constants, biases, found[0], _UNITS) for found in rest]
        inputs = [*x, weight[0], _moved(constants, scales, weight[1]), _ZERO, *after[0].input[1:], *bias]
        fused = helper.make_node("QLinearConv", inputs, [after[0].output[0]])
        fused.attribute.extend(node.attribute)
        new[node.output[0]] = fused
        gone.add(after[0].output[0])
    if not new:
        return
    nodes = [new.get(node.output[0], node) for node in graph.node if node.output[0] not in gone or node in new.values()]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), _ZERO))
    scales.write(model)
    biases.write(model, _UNITS)
    _drop_unread(graph)


def _moved(constants: dict[str, Array], halves: Halves, name: str, unit: float = 1.0) -> str:
    """Where a vector is found from now on, in float16 if that can hold its units: it loses up to 2^-12 of itself."""
    values = constants[name].astype(np.float32) / np.float32(unit)
    half = in_half(values) if values.ndim == 1 else None
    if half is None:
        return name
    halves.add(f"{name}.wide", half)
    return f"{name}.wide"


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Nodes whose results nobody reads any more."""
    outputs = {value.name for value in graph.output}
    while True:
        read = outputs | {name for node in graph.node for name in node.input}
        kept = [node for node in graph.node if read & set(node.output)]
        if len(kept) == len(graph.node):
            return
        del graph.node[:]
        graph.node.extend(kept)

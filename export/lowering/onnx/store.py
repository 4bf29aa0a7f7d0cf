"""Initializers in float16 or int8, where these hold their values exactly, and nodes that widen them.

Onnxruntime folds those nodes when it loads the program: what shrinks is the file, not the memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgetrain.export.lowering.onnx.halves import Halves, exact_in_half
from edgetrain.export.lowering.onnx.slim import slim
from edgetrain.export.storage.frozen_weights import MIN_ELEMENTS, MIN_VECTOR
from edgetrain.protocol.int8 import row_scales

# Below this, another node costs more than half precision saves.
MIN_HALVES = 24


def store(data: bytes, kind: str) -> bytes:
    """An ONNX model with those initializers in float16 or int8 whose values it holds exactly; the others stay."""
    model = onnx.load_from_string(data)
    vectors = Halves("vectors")
    kept, nodes = [], []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or not np.isfinite(values).all():
            found = None
        elif values.ndim == 1 and values.size >= MIN_VECTOR and exact_in_half(values):
            vectors.add(tensor.name, values)
            continue
        else:
            found = _halved(values, tensor.name) if kind == "float16" else _whole(values, tensor.name)
        if found is None:
            kept.append(tensor)
        else:
            kept += found[0]
            nodes += found[1]
    outputs = {value.name for value in model.graph.output}
    assert not outputs & {node.output[0] for node in nodes}
    old = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend([*nodes, *old])
    vectors.write(model)
    slim(model)
    stored: bytes = model.SerializeToString(deterministic=True)
    return stored


Compact = tuple[list[onnx.TensorProto], list[onnx.NodeProto]]


def _halved(values: npt.NDArray[np.float32], name: str) -> Compact | None:
    if values.size < MIN_HALVES or not exact_in_half(values):
        return None
    cast = helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
    return [numpy_helper.from_array(values.astype(np.float16), f"{name}.half")], [cast]


def _whole(values: npt.NDArray[np.float32], name: str) -> Compact | None:
    for axis in range(values.ndim):
        if values.size < max(MIN_ELEMENTS, 8 * values.shape[axis]):
            continue
        scale = _scales(values, axis)
        whole = np.rint(values / scale).astype(np.int8)
        if np.array_equal(whole * scale, values):
            tensors = [numpy_helper.from_array(whole, f"{name}.int8")]
            found = _halved(scale, f"{name}.scale") or ([numpy_helper.from_array(scale, f"{name}.scale")], [])
            # Not DequantizeLinear: onnxruntime fuses it into products that round the activations too.
            cast = helper.make_node("Cast", [f"{name}.int8"], [f"{name}.whole"], to=onnx.TensorProto.FLOAT)
            product = helper.make_node("Mul", [f"{name}.whole", f"{name}.scale"], [name])
            return tensors + found[0], [cast, *found[1], product]
    return None


def _scales(weight: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Largest / 127 along an axis, rounded up so that 127 is never exceeded."""
    others = tuple(dim for dim in range(weight.ndim) if dim != axis)
    return row_scales(np.abs(weight).max(axis=others, keepdims=True))

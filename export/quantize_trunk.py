"""The trunk in int8 arithmetic: post-training quantization by onnxruntime's own tools.

`int8-static` measures the range of every activation on calibration data and inserts quantize and dequantize nodes,
which onnxruntime fuses into int8 kernels; weights have a scale for each output channel. `int8-dynamic` quantizes
activations when they come, by the range of each.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import numpy_helper

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.lowering.base import Array
from edgetrain.export.quiet import quiet


def quantize_trunk(data: bytes, kind: str, batches: Sequence[Sequence[Array]]) -> bytes:
    """The quantized model.

    Args:
        data: the trunk as float32 ONNX.
        kind: "int8-static" or "int8-dynamic".
        batches: the model's inputs in order, for static ranges.

    Raises:
        UnsupportedError: onnxruntime cannot quantize it.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static  # noqa: PLC0415

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    names = [value.name for value in model.graph.input]
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder, quiet():
        out = Path(folder) / "quantized.onnx"
        # It warns through the root logger about a preparation that shapes without unknowns do not need.
        root.setLevel(logging.ERROR)
        try:
            if kind == "int8-dynamic":
                quantize_dynamic(model, out, per_channel=True, weight_type=QuantType.QInt8)
            else:
                quantize_static(
                    model,
                    out,
                    _Reader(names, batches),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
        except Exception as error:  # its tools raise whatever they met
            raise UnsupportedError(f"onnxruntime cannot quantize the trunk as {kind}: {error}") from error
        finally:
            root.setLevel(level)
        quantized = onnx.load(out)
    _shorten(quantized)
    result: bytes = quantized.SerializeToString(deterministic=True)
    return result


def _shorten(model: onnx.ModelProto) -> None:
    """Takes away what a small model would notice: long names, shapes of inner values, zero points that are zero."""
    model.producer_name, model.producer_version = "edgetrain", ""
    del model.metadata_props[:]
    graph = model.graph
    del graph.value_info[:]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        node.name = node.doc_string = ""
        point = constants.get(node.input[2]) if node.op_type == "DequantizeLinear" and len(node.input) == 3 else None
        if point is not None and point.data_type != onnx.TensorProto.UINT8 and not numpy_helper.to_array(point).any():
            del node.input[2]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    for old in (*(tensor.name for tensor in kept), *(name for node in graph.node for name in node.output)):
        names.setdefault(old, f"{len(names):x}" if old else "")
    del graph.initializer[:]
    for tensor in kept:
        tensor.name = names[tensor.name]
        graph.initializer.append(tensor)
    for node in graph.node:
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] if name else "" for name in node.output]


class _Reader:
    """Calibration batches as onnxruntime asks for them."""

    def __init__(self, names: Sequence[str], batches: Sequence[Sequence[Array]]) -> None:
        self._rest: Iterator[dict[str, Array]] = (dict(zip(names, batch, strict=True)) for batch in batches)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch."""
        return next(self._rest, None)

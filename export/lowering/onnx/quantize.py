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

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.lowering.base import Array
from edgetrain.export.lowering.onnx.quantized_convolutions import fuse_convolutions
from edgetrain.export.lowering.onnx.slim import slim
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
    fuse_convolutions(quantized)
    slim(quantized)
    result: bytes = quantized.SerializeToString(deterministic=True)
    return result


class _Reader:
    """Calibration batches as onnxruntime asks for them."""

    def __init__(self, names: Sequence[str], batches: Sequence[Sequence[Array]]) -> None:
        self._rest: Iterator[dict[str, Array]] = (dict(zip(names, batch, strict=True)) for batch in batches)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch."""
        return next(self._rest, None)

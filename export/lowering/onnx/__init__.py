"""Graphs to plain ONNX, for the ordinary onnxruntime (and for onnxruntime-web)."""

from __future__ import annotations

from edgetrain.export.lowering.onnx.lowering import OnnxLowering

__all__ = ["OnnxLowering"]

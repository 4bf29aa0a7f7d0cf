"""Graphs to ExecuTorch programs (.pte) on XNNPACK."""

from __future__ import annotations

from edgetrain.export.lowering.executorch.lowering import VERSION, ExecutorchLowering

__all__ = ["VERSION", "ExecutorchLowering"]

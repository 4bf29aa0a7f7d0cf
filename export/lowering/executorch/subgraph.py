"""Reading an XNNPACK subgraph, ExecuTorch's `XNNGraph`, before it is written."""

from __future__ import annotations

from typing import Any


def operands(node: Any, kind: str = "") -> dict[str, int]:
    """Numbers of the values that a node reads ("input"), makes ("output") or both, by the fields that name them."""
    return {name: value for name, value in vars(node).items() if name.startswith(kind) and name.endswith("_id")}


def tensor_of(value: Any) -> Any:
    """What a value is, quantized or not; its number is `id_out`."""
    return getattr(value.xvalue_union, "tensor_value", value.xvalue_union)

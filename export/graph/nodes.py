"""What is often asked of a traced graph's nodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def is_constant(value: Any) -> bool:
    """Whether an operand is a tensor of the module."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def shape_of(value: Any) -> tuple[int, ...]:
    """Of an operand that is a tensor; empty for a number and for what the trace has no shape of."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(found.shape) if isinstance(found, Tensor) else ()

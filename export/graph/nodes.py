"""What is often asked of a traced graph's nodes, and how one is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


def is_constant(value: Any) -> bool:
    """Whether an operand is a tensor of the module."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def shape_of(value: Any) -> tuple[int, ...]:
    """Of an operand that is a tensor; empty for a number and for what the trace has no shape of."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(found.shape) if isinstance(found, Tensor) else ()


def call(graph: fx.Graph, target: Any, *operands: Any, **options: Any) -> fx.Node:
    """A new node with its value's shape, which later passes read."""
    node = graph.call_function(target, operands, options)
    node.meta["val"] = target(*fx.node.map_arg(operands, _empty), **options)
    return node


def _empty(node: fx.Node) -> Any:
    """Of the same shape, in no memory and no trace."""

    def empty(value: Any) -> Any:
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")

    return fx.node.map_aggregate(node.meta["val"], empty)

"""Pieces of a tensor's memory, as tensors of their own: they cost nothing.

Runs that begin at different places of the same images overlap, and XNNPACK would copy each of them. ExecuTorch's memory
plan says where each tensor lies, so a piece of one is a tensor that lies some bytes behind its beginning (`memory.py`).
In a graph it is an `as_strided_copy` with a contiguous result. Where the whole is not planned, as what the caller hands
in is not, that is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def piece(x: Tensor, start: int, shape: Sequence[int]) -> Tensor:
    """What lies in a contiguous tensor from an element on."""
    result: Tensor = aten.as_strided_copy.default(x, list(shape), _strides(shape), start)
    return result


def is_piece(node: fx.Node) -> bool:
    """Whether a node, of whichever dialect, says no more than where in its argument its result lies."""
    if node.op != "call_function" or "as_strided_copy" not in str(node.target):
        return False
    _, shape, strides, *_ = node.args
    return list(_integers(strides)) == _strides(_integers(shape))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _integers(value: Any) -> Sequence[int]:
    assert isinstance(value, Sequence)
    return value

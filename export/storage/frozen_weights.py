"""Frozen weights in fewer bytes: rounded here, then stored by a lowering without any further loss.

`float16` rounds to half precision, `int8` to whole multiples of one scale for each output channel (row), largest / 127.
Scales have 11 significant bits, so a multiple of up to 127 is exact in float32: the stored program computes with the
very numbers that the rounded graph has, which torch can run and prove. Biases and the weights of norms, and the scales
where they are normal numbers there, take half precision in both.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from edgetrain.export.graph.joint import TracedGraph, round_rows

# Below this, a scale and another node cost more than they save; for the half precision of vectors, another name.
MIN_ELEMENTS = 256
MIN_VECTOR = 8


def rounded(graph: TracedGraph, kind: str) -> TracedGraph:
    """The graph with its frozen weights rounded to float16 or int8."""
    module = copy.deepcopy(graph.module)
    for name, tensor in list(module.named_buffers()):
        if not name.startswith(("frozen_", "folded_")):
            continue
        if is_weight(tensor):
            setattr(module, name, round_weight(tensor, kind))
        elif _is_vector(name, tensor):
            setattr(module, name, round_weight(tensor, "float16"))
    return replace(graph, module=module, forward=None, first=None)


def round_weight(weight: Tensor, kind: str) -> Tensor:
    """One weight, [O, ...], rounded: float16, or int8 with a scale for every row."""
    if kind == "int8":
        return round_rows(weight)
    half = weight.half()
    return half.float() if bool(torch.isfinite(half).all()) else weight


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is worth fewer bytes."""
    return (
        tensor.dtype == torch.float32
        and tensor.ndim >= 2
        and tensor.numel() >= MIN_ELEMENTS
        and bool(torch.isfinite(tensor).all())
    )


def _is_vector(name: str, tensor: Tensor) -> bool:
    """A bias, or the weight of a norm. Not any buffer: half precision is too little for frequencies."""
    named = name.startswith("folded_") or name.rstrip("_").endswith(("bias", "weight"))
    return named and tensor.dtype == torch.float32 and tensor.ndim == 1 and tensor.numel() >= MIN_VECTOR

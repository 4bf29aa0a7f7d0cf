"""Frozen weights in fewer bytes: rounded first, then stored without any further loss.

`float16` rounds to half precision, `int8` to whole multiples of one scale for each output channel (row), largest / 127.
Scales have at most 16 significant bits, so a multiple of up to 127 is exact in float32: the stored program computes
with the very numbers that the rounded graph has, which torch can run and prove. Onnxruntime widens them when it loads
the program: what shrinks is the file, not the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from edgetrain.export.batch import ExampleBatch
from edgetrain.export.errors import UnsupportedError
from edgetrain.export.joint import TracedGraph

KINDS = ("float32", "float16", "int8", "int8-static", "int8-dynamic")
RUNTIME_KINDS: Mapping[str, tuple[str, ...]] = {"onnxruntime": KINDS[1:], "executorch": ("int8-static",)}
# Below this, a scale and another node cost more than they save.
MIN_ELEMENTS = 256
# Relative change of the loss that passes if the user states no other.
MAX_LOSS_CHANGE = 0.05


@dataclass(frozen=True)
class Storage:
    """How the frozen part is to be stored."""

    # One of `KINDS`.
    kind: str = "float32"
    # `(inputs, targets)` with any number of samples; None for the example batch.
    calibration: ExampleBatch | None = None
    # The export fails if the loss on the calibration data changes by a larger share.
    max_loss_change: float = MAX_LOSS_CHANGE

    def check(self, runtimes: tuple[str, ...]) -> None:
        """Refuses what cannot be done, before any work.

        Raises:
            UnsupportedError: an unknown kind, or a runtime that cannot take it.
        """
        if self.kind not in KINDS:
            raise UnsupportedError(f"frozen weights cannot be stored as {self.kind!r}, only as: {', '.join(KINDS)}")
        if not self.max_loss_change > 0:
            raise UnsupportedError(f"max_loss_change is {self.max_loss_change}, must be above 0")
        if self.kind == "float32":
            return
        if others := [name for name in runtimes if name not in RUNTIME_KINDS]:
            raise UnsupportedError(
                f"frozen weights as {self.kind} are for onnxruntime and executorch, not for {', '.join(others)}, and "
                "the self-test of a bundle holds for all of its runtimes: export a bundle of its own for each"
            )
        if len(set(runtimes)) > 1:
            raise UnsupportedError(
                f"frozen weights as {self.kind} are rounded otherwise for {' than for '.join(dict.fromkeys(runtimes))}"
                ", and the self-test of a bundle holds for all of its runtimes: export a bundle of its own for each"
            )
        if self.kind not in RUNTIME_KINDS[runtimes[0]]:
            raise UnsupportedError(
                f"frozen weights as {self.kind} are not for executorch: XNNPACK multiplies float32 activations with "
                "float32 weights only, and its integers want ranges known beforehand: use int8-static"
            )

    @property
    def tolerance(self) -> float:
        """Of the self-test on other machines."""
        return 2e-2 if self.kind in ("int8-static", "int8-dynamic") else 1e-3


def quantized_names(frozen: Mapping[str, Tensor], kind: str) -> dict[str, str]:
    """The frozen tensors that are rounded one by one, with the dtype that they are stored in."""
    return {} if kind == "float32" else {name: kind for name, tensor in frozen.items() if is_weight(tensor)}


def rounded(graph: TracedGraph, kind: str) -> TracedGraph:
    """The graph with its frozen weights rounded."""
    module = copy.deepcopy(graph.module)
    for name, tensor in list(module.named_buffers()):
        if name.startswith(("frozen_", "folded_")) and is_weight(tensor):
            setattr(module, name, round_weight(tensor, kind))
    return replace(graph, module=module)


def round_weight(weight: Tensor, kind: str) -> Tensor:
    """One weight, [O, ...], rounded: float16, or int8 with a scale for every row."""
    if kind == "float16":
        half = weight.half()
        return half.float() if bool(torch.isfinite(half).all()) else weight
    if kind == "int8":
        scale = _scales(weight.detach().numpy(), 0)
        return torch.from_numpy(np.rint(weight.numpy() / scale) * scale)
    return weight


def is_weight(tensor: Tensor) -> bool:
    """Whether storing a frozen tensor in fewer bytes is worth it."""
    return (
        tensor.dtype == torch.float32
        and tensor.ndim >= 2
        and tensor.numel() >= MIN_ELEMENTS
        and bool(torch.isfinite(tensor).all())
    )


def _scales(weight: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Largest / 127 along an axis, with 16 significant bits, rounded up so that 127 is never exceeded."""
    others = tuple(dim for dim in range(weight.ndim) if dim != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    mantissa, exponent = np.frexp(largest.astype(np.float64) / 127)
    scale = np.ldexp(np.ceil(mantissa * 2**16) / 2**16, exponent)
    return np.where(largest > 0, scale, 1).astype(np.float32)


def store(data: bytes, kind: str) -> bytes:
    """An ONNX model with those initializers in `kind` whose values it holds exactly; the others stay as they are."""
    if kind == "float32":
        return data
    model = onnx.load_from_string(data)
    kept, nodes = [], []
    for tensor in model.graph.initializer:
        found = _compact(tensor, kind)
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
    stored: bytes = model.SerializeToString(deterministic=True)
    return stored


def _compact(tensor: onnx.TensorProto, kind: str) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]] | None:
    values = numpy_helper.to_array(tensor)
    if values.dtype != np.float32 or values.ndim < 2 or values.size < MIN_ELEMENTS or not np.isfinite(values).all():
        return None
    name = tensor.name
    if kind == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            return None
        cast = helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
        return [numpy_helper.from_array(half, f"{name}.half")], [cast]
    for axis in range(values.ndim):
        if values.size / values.shape[axis] < 8:
            continue
        scale = _scales(values, axis)
        whole = np.rint(values / scale).astype(np.int8)
        if np.array_equal(whole * scale, values):
            stored = [
                numpy_helper.from_array(whole, f"{name}.int8"),
                numpy_helper.from_array(scale, f"{name}.scale"),
            ]
            # Not DequantizeLinear: onnxruntime fuses it into products that round the activations too.
            cast = helper.make_node("Cast", [f"{name}.int8"], [f"{name}.whole"], to=onnx.TensorProto.FLOAT)
            return stored, [cast, helper.make_node("Mul", [f"{name}.whole", f"{name}.scale"], [name])]
    return None

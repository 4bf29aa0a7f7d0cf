"""Frozen weights in fewer bytes: rounded here, then stored by a lowering without any further loss.

`float16` rounds to half precision, `int8` to whole multiples of one scale for each output channel (row), largest / 127.
Scales have 11 significant bits, so a multiple of up to 127 is exact in float32: the stored program computes with the
very numbers that the rounded graph has, which torch can run and prove. Biases and the weights of norms, and the scales
where they are normal numbers there, take half precision in both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgetrain.export.batch import ExampleBatch
from edgetrain.export.errors import ToleranceError, UnsupportedError
from edgetrain.export.graph.joint import TracedGraph, round_rows

# Kinds in which the trunk computes with integers.
TRUNK_KINDS = ("int8-static", "int8-dynamic")
KINDS = ("float32", "float16", "int8", *TRUNK_KINDS)
RUNTIME_KINDS: Mapping[str, tuple[str, ...]] = {"onnxruntime": KINDS[1:], "executorch": ("int8-static",)}
TRAINABLE_KINDS = ("float32", "int8")
# Below this, a scale and another node cost more than they save; for the half precision of vectors, another name.
MIN_ELEMENTS = 256
MIN_VECTOR = 8
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
    # "int8": weights that learn are whole numbers with a scale for each row, on the device, too.
    trainable: str = "float32"

    def check(self, runtimes: Sequence[str]) -> None:
        """Refuses what cannot be done, before any work.

        Args:
            runtimes: to export for, each once.

        Raises:
            UnsupportedError: an unknown kind, or a runtime that cannot take it.
        """
        if self.kind not in KINDS:
            raise UnsupportedError(f"frozen weights cannot be stored as {self.kind!r}, only as: {', '.join(KINDS)}")
        if not self.max_loss_change > 0:
            raise UnsupportedError(f"max_loss_change is {self.max_loss_change}, must be above 0")
        if self.trainable not in TRAINABLE_KINDS:
            raise UnsupportedError(
                f"trainable weights cannot be stored as {self.trainable!r}, only as: {', '.join(TRAINABLE_KINDS)}"
            )
        if self.kind != "float32":
            self._check_runtimes(runtimes)
        others = ", ".join(name for name in runtimes if name != "onnxruntime")
        if self.trainable != "float32" and others:
            raise UnsupportedError(
                f"trainable weights as {self.trainable} are for onnxruntime only, not for {others}: no other session "
                "binds whole numbers and scales. Export a bundle of its own for each"
            )

    def _check_runtimes(self, runtimes: Sequence[str]) -> None:
        if others := ", ".join(name for name in runtimes if name not in RUNTIME_KINDS):
            raise UnsupportedError(
                f"frozen weights as {self.kind} are for onnxruntime and executorch, not for {others}, and the "
                "self-test of a bundle holds for all of its runtimes: export a bundle of its own for each"
            )
        if len(runtimes) > 1:
            raise UnsupportedError(
                f"frozen weights as {self.kind} are rounded otherwise for {' than for '.join(runtimes)}, and the "
                "self-test of a bundle holds for all of its runtimes: export a bundle of its own for each"
            )
        if self.kind not in RUNTIME_KINDS[runtimes[0]]:
            raise UnsupportedError(
                f"frozen weights as {self.kind} are not for executorch: XNNPACK multiplies float32 activations with "
                "float32 weights only, and its integers want ranges known beforehand: use int8-static"
            )

    def check_frozen(self, frozen: Mapping[str, Tensor]) -> None:
        """Refuses a storage that nothing would be stored in.

        Raises:
            UnsupportedError: no frozen weight is worth fewer bytes.
        """
        if self.kind != "float32" and not any(is_weight(tensor) for tensor in frozen.values()):
            raise UnsupportedError(
                f"no weight of {MIN_ELEMENTS} elements or more is frozen: there is nothing to store as {self.kind}. "
                "Leave it out, or let less learn"
            )

    def check_clipping(self) -> None:
        """Refuses what does not go with per-sample clipping.

        Raises:
            UnsupportedError: weights of another kind than float32.
        """
        if self.kind != "float32":
            raise UnsupportedError(f"per-sample clipping needs float32 weights, not {self.kind}: leave out one of them")
        if self.trainable != "float32":
            raise UnsupportedError(
                f"per-sample clipping needs trainable weights in float32, not {self.trainable}: its graph takes no "
                "whole numbers. Leave out one of them"
            )

    def check_loss(self, what: str, before: float, after: float, remedy: str) -> None:
        """Refuses a change of the calibration data's mean loss that is larger than allowed.

        Raises:
            ToleranceError: it is, or is not a number.
        """
        change = abs(after - before) / max(abs(before), 1e-12)
        if not change <= self.max_loss_change:
            raise ToleranceError(
                f"{what} change the loss on the calibration data from {before:.5g} to {after:.5g}, by {change:.1%}; "
                f"allowed are {self.max_loss_change:.1%}. No bundle was written. {remedy}"
            )

    @property
    def tolerance(self) -> float:
        """Of the self-test on other machines."""
        return 2e-2 if self.kind in TRUNK_KINDS else 1e-3


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
    return replace(graph, module=module)


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

"""How a user wants weights stored, and what does not go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgetrain.export.batch import ExampleBatch
from edgetrain.export.errors import ToleranceError, UnsupportedError
from edgetrain.export.lowering.base import Lowering, StoringLowering
from edgetrain.export.storage.frozen_weights import MIN_ELEMENTS, is_weight

# Kinds in which the trunk computes with integers.
TRUNK_KINDS = ("int8-static", "int8-dynamic")
KINDS = ("float32", "float16", "int8", *TRUNK_KINDS)
TRAINABLE_KINDS = ("float32", "int8")
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

    def check(self, lowerings: Sequence[Lowering]) -> None:
        """Refuses what cannot be done, before any work.

        Args:
            lowerings: of the runtimes to export for, each once.

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
            self._check_lowerings(lowerings)
        others = ", ".join(lowering.runtime for lowering in lowerings if lowering.runtime != "onnxruntime")
        if self.trainable != "float32" and others:
            raise UnsupportedError(
                f"trainable weights as {self.trainable} are for onnxruntime only, not for {others}: no other session "
                "binds whole numbers and scales. Export a bundle of its own for each"
            )

    def _check_lowerings(self, lowerings: Sequence[Lowering]) -> None:
        storing = [lowering for lowering in lowerings if isinstance(lowering, StoringLowering)]
        if others := ", ".join(lowering.runtime for lowering in lowerings if lowering not in storing):
            raise UnsupportedError(
                f"frozen weights as {self.kind} are for onnxruntime and executorch, not for {others}, and the "
                "self-test of a bundle holds for all of its runtimes: export a bundle of its own for each"
            )
        if len(storing) > 1:
            names = " than for ".join(lowering.runtime for lowering in storing)
            raise UnsupportedError(
                f"frozen weights as {self.kind} are rounded otherwise for {names}, and the "
                "self-test of a bundle holds for all of its runtimes: export a bundle of its own for each"
            )
        for lowering in storing:
            if reason := lowering.cannot_store(self.kind):
                raise UnsupportedError(f"frozen weights as {self.kind} are not for {lowering.runtime}: {reason}")

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

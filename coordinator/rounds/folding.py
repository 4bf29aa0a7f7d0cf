"""Exact sums: contributions as 64-bit fixed-point integers.

Integer addition is associative, so the sum does not depend on the order of arrival, is the same after a
crash and a replay, can be added up from partial sums, and is the form that secure aggregation needs.

Each contribution `weight * value` is rounded once to a multiple of 2^-30, an error of at most 2^-31 each;
after division by the total weight that is far below float32's resolution of any delta that matters.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.held_blocks import HeldBlocks, is_worth_holding
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.codecs.blocks import BlockCodes

FRACTION_BITS = 30
_LIMIT = 2**63 - 1
# Elements that are folded at a time.
_PIECE = 1 << 15
# See `_rounded`.
_SMALL = 2**51
_SHIFT = 1.5 * 2**52
_SHIFT_BITS = int(np.float64(_SHIFT).view(np.int64))


class FixedPointSum:
    """A running weighted sum of updates, int64 [num_parameters].

    It cannot overflow: `_bound` is the largest magnitude that any element can have, and an update that would bring it
    past 2^63 - 1 is refused before it is added.
    """

    def __init__(self, num_parameters: int) -> None:
        self._total: npt.NDArray[np.int64] = np.zeros(num_parameters, np.int64)
        # What counts already, but waits to be added with others.
        self._held: HeldBlocks | None = None
        self.weight = 0
        self.count = 0
        self._bound = 0
        self._limit = _LIMIT

    @property
    def total(self) -> npt.NDArray[np.int64]:
        """In multiples of 2^-30."""
        if self._held:
            self._held.add_to(self._total)
        return self._total

    def share(self, parts: int) -> None:
        """Keeps to the share of one of so many sums that will be merged, so that they cannot overflow together."""
        self._limit = _LIMIT // parts

    def merge(self, other: FixedPointSum) -> None:
        """Adds another sum of as many parameters: to the bit what one sum of all their updates would be.

        Raises:
            UpdateRefused: together they could overflow, which sums with a `share` each never do.
        """
        if self._bound + other._bound > _LIMIT:
            raise UpdateRefused("partial sums are too large to be added exactly")
        self._total += other.total
        self._bound += other._bound
        self.weight += other.weight
        self.count += other.count

    def add(self, update: SparseOrDense, weight: int, scale: float = 1.0) -> None:
        """Adds `weight * scale * update`.

        Args:
            update: of `num_parameters`, finite.
            weight: a positive integer, e.g. the number of examples.
            scale: a further factor, which does not count in the sum of the weights; a function of this
                contribution alone, or the sum would depend on the order.

        Raises:
            UpdateRefused: of another length, or so large that the sum could overflow. Nothing was added.
        """
        blocks = update.blocks
        if blocks is not None and scale == 1.0 and is_worth_holding(blocks, weight):
            factor = float(weight) * 2.0**FRACTION_BITS
            largest = int(blocks.top * blocks.largest * factor)
            if update.num_parameters == len(self._total) and self._fits(largest):
                self._hold(blocks, factor)
                self._count(largest, weight)
                return
        factor, largest = self._checked(update, weight, scale)
        # In pieces that stay in the processor's cache.
        for start in range(0, len(update.values), _PIECE):
            piece = slice(start, start + _PIECE)
            scaled = update.values[piece].astype(np.float64)
            scaled *= factor
            quantized = _rounded(scaled) if largest < _SMALL else np.rint(scaled, out=scaled).astype(np.int64)
            if update.indices is None:
                self._total[piece] += quantized
            else:
                np.add.at(self._total, update.indices[piece], quantized)
        self._count(largest, weight)

    def check(self, update: SparseOrDense, weight: int) -> None:
        """Raises what `add` would raise, and adds nothing: for those who fill two sums with one update."""
        self._checked(update, weight, 1.0)

    def _count(self, largest: int, weight: int) -> None:
        self._bound += largest + 1
        self.weight += weight
        self.count += 1

    def _fits(self, largest: int) -> bool:
        return self._bound + largest + 1 <= self._limit

    def _hold(self, blocks: BlockCodes, factor: float) -> None:
        if self._held and not self._held.takes(blocks):
            self._held.add_to(self._total)
        if self._held is None or not self._held.takes(blocks):
            self._held = HeldBlocks(blocks)
        self._held.hold(blocks, factor)

    def _checked(self, update: SparseOrDense, weight: int, scale: float) -> tuple[float, int]:
        """What makes values units of 2^-30, and the largest of them in these units."""
        if update.num_parameters != len(self._total):
            raise UpdateRefused(f"the update has {update.num_parameters} parameters, the model has {len(self._total)}")
        factor = float(weight) * scale * 2.0**FRACTION_BITS
        values = update.values
        # Rounding is monotonic: the largest product is that of the largest value. A NaN stays one.
        high, low = (float(values.max()), float(values.min())) if len(values) else (0.0, 0.0)
        largest = max(high * factor, low * factor, -high * factor, -low * factor)
        if not math.isfinite(largest) or math.isnan(high) or not self._fits(int(largest)):
            raise UpdateRefused("the update's values are too large to be summed exactly")
        return factor, int(largest)

    def mean(self) -> npt.NDArray[np.float64]:
        """The weighted mean, float64 [num_parameters]; zeros if nothing was added."""
        return self.over(self.weight)

    def added_to(self, parameters: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Parameters plus the weighted mean: the sum is float64 and rounded once, float32 [num_parameters]."""
        divisor, total = float(self.weight or 1) * 2.0**FRACTION_BITS, self.total
        result = np.empty(len(total), np.float32)
        for start in range(0, len(result), _PIECE):
            piece = slice(start, start + _PIECE)
            # With nothing added, the total is zero.
            result[piece] = parameters[piece] + total[piece] / divisor
        return result

    def over(self, divisor: float) -> npt.NDArray[np.float64]:
        """The sum divided by something else than the weights, float64 [num_parameters]; zeros for 0."""
        if divisor == 0:
            return np.zeros(len(self._total), np.float64)
        return self.total / (float(divisor) * 2.0**FRACTION_BITS)


def _rounded(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """`rint` of values smaller than 2^51, in place, in half the time.

    Plus 1.5 * 2^52, a float64 has no room for fractions: the sum is rounded as `rint` rounds, to even, and its lowest
    bits are the integer, in two's complement.
    """
    values += _SHIFT
    integers = values.view(np.int64)
    integers -= _SHIFT_BITS
    return integers

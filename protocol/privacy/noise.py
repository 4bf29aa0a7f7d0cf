"""Integer noise, sampled exactly.

Floating-point noise leaks through its gaps (Mironov 2012; Haney, Desfontaines et al. 2022, "Precision-based attacks
and interval refining"). So sums are integers (steps of a grid) before noise is added, and so is the noise:

- `rounded_gaussian`: a real Gaussian, rounded to an integer. Added to an integer x it equals round(x + Gaussian):
  the rounding is post-processing, so every theorem on the Gaussian mechanism holds as it stands, sampling included.
  For noise that one party adds.
- `discrete_gaussian`: Canonne, Kamath and Steinke 2020. For shares of noise that several parties add.
- `skellam`: difference of two Poisson variables; shares add up to Skellam exactly.

Both Gaussians are drawn by rejection from a staircase over the half-line (von Neumann; Devroye 1986, chapter II.3):
a stair by a table of 128-bit thresholds, a place on it by uniform bits, accepted with probability density / stair. A
comparison of a random number with that probability is decided in float32 where it is clear by more than the rounding
error, else (about once in 2^17) in float64, else (about once in 2^29) in as many bits as it takes. So the only
inexactness is that of the table: 2^-110 in total variation, with the tail beyond 13.5 deviations cut (2^-130).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.randomness import RandomBytes, Words, integers, words

Integers = npt.NDArray[np.int64]
Entries = npt.NDArray[np.signedinteger[Any]]
Unsigned = npt.NDArray[np.unsignedinteger[Any]]
Singles = npt.NDArray[np.float32]
Coins = npt.NDArray[np.bool_]

Noise = Callable[[RandomBytes, int], Integers]
"""`noise(random_bytes, size)` -> int64 [size], independent."""

# Where the tail is cut, in deviations: e^(-13.5^2 / 2) < 2^-131.
_REACH = 13.5
# Float32 decides where a coin and a probability differ by more than this. The exponent is at most 0.9 with a slope of
# at most 0.9 along a stair, so its five roundings, that of the place to 24 bits among them, come to less than 2^-21,
# exp to 2^-22, and the coin's to 2^-24.
_CLEAR = 2.0**-18
# And float64 where they differ by more than this: 32 bits of the place and of the coin are known.
_CLEAR_64 = 2.0**-30
# Elements drawn at a time: bounds the memory, and stays in the cache.
_CHUNK = 1 << 13
# Tables are entered by so many leading bits.
_GUIDE_BITS = 14
MAX_DEVIATION = 2.0**45
# Tables of Poisson distributions grow with the deviation.
MAX_SKELLAM_DEVIATION = 2.0**14


def rounded_gaussian(deviation: float) -> Noise:
    """Gaussian noise, rounded to integers.

    Args:
        deviation: before rounding, above 0 and at most 2^45.

    Raises:
        PrivacyError: a deviation out of range.
    """
    return _staircase(_checked(deviation, MAX_DEVIATION), discrete=False).draw


def discrete_gaussian(deviation: float) -> Noise:
    """Noise with probability proportional to exp(-k^2 / (2 deviation^2)) at every integer k.

    Args:
        deviation: the parameter sigma, above 0 and at most 2^45; the real deviation is never larger.

    Raises:
        PrivacyError: a deviation out of range.
    """
    return _staircase(_checked(deviation, MAX_DEVIATION), discrete=True).draw


def skellam(deviation: float) -> Noise:
    """The difference of two Poisson variables of mean deviation^2 / 2 each.

    Args:
        deviation: above 0 and at most 2^14; beyond, a discrete Gaussian costs no more privacy.

    Raises:
        PrivacyError: a deviation out of range.
    """
    _, table = _poisson_table(_checked(deviation, MAX_SKELLAM_DEVIATION) ** 2 / 2)

    def entries(random_bytes: RandomBytes, size: int) -> Integers:
        leading = integers(random_bytes, size, np.uint16) >> np.uint16(16 - _GUIDE_BITS)
        return _pick(table, leading, random_bytes).astype(np.int64)

    def draw(random_bytes: RandomBytes, size: int) -> Integers:
        return entries(random_bytes, size) - entries(random_bytes, size)

    return draw


def largest(kind: Callable[[float], Noise], deviation: float) -> int:
    """No noise of that kind and deviation is larger in magnitude, for arithmetic that must not overflow.

    Args:
        kind: `rounded_gaussian`, `discrete_gaussian` or `skellam`.
        deviation: as for that.
    """
    if kind is skellam:
        _, table = _poisson_table(deviation**2 / 2)
        return len(table.high)
    stairs = _staircase(deviation, discrete=kind is discrete_gaussian)
    return math.ceil((len(stairs.stairs.high) + 1) * 2.0**stairs.log_width)


def _checked(deviation: float, most: float) -> float:
    if not 0 < deviation <= most:
        raise PrivacyError(f"noise of deviation {deviation:g} steps of the grid: must be above 0 and at most {most:g}")
    return float(deviation)


# --- tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """Cumulative probabilities in units of 2^-128: of entry i, up to and including it, but for the last."""

    high: Words
    low: Words
    # The entry for each value of the leading bits; -1 where a threshold lies within.
    guide: Entries

    @classmethod
    def of(cls, thresholds: list[int]) -> _Table:
        """A table of 128-bit thresholds, ascending."""
        high = np.array([threshold >> 64 for threshold in thresholds], np.uint64)
        low = np.array([threshold & (2**64 - 1) for threshold in thresholds], np.uint64)
        cells = np.arange(2**_GUIDE_BITS, dtype=np.uint64) << np.uint64(64 - _GUIDE_BITS)
        # Thresholds at a cell's very first value leave its entry open, too.
        first = np.searchsorted(high, cells, side="left")
        last = np.searchsorted(high, cells | np.uint64(2 ** (64 - _GUIDE_BITS) - 1), side="right")
        # Small, to stay in the cache.
        kind = np.int16 if len(thresholds) < 2**15 else np.int32
        return cls(high, low, np.where(first == last, first, -1).astype(kind))


def _table(weights: list[Decimal]) -> _Table:
    total = sum(weights, Decimal(0))
    running = Decimal(0)
    thresholds = []
    for weight in weights[:-1]:
        running += weight
        thresholds.append(min(int(running / total * 2**128), 2**128 - 1))
    return _Table.of(thresholds)


def _pick(table: _Table, leading: Unsigned, random_bytes: RandomBytes) -> Entries:
    """Entries by their probabilities, from their leading bits and further ones where those do not tell."""
    picked: Entries = table.guide.take(leading)
    unclear = np.flatnonzero(picked < 0)
    if not len(unclear):
        return picked
    drawn = words(random_bytes, len(unclear)) >> np.uint64(_GUIDE_BITS)
    drawn |= leading[unclear].astype(np.uint64) << np.uint64(64 - _GUIDE_BITS)
    entries = np.searchsorted(table.high, drawn, side="right")
    # Where the first 64 bits do not tell: once in 2^64 / len(table).
    for tie in np.flatnonzero(table.high[np.maximum(entries, 1) - 1] == drawn):
        rest = words(random_bytes, 1)[0]
        same = np.flatnonzero(table.high == drawn[tie])
        entries[tie] = same[0] + int(np.count_nonzero(table.low[same] <= rest))
    picked[unclear] = entries
    return picked


@lru_cache(maxsize=8)
def _poisson_table(mean: float) -> tuple[int, _Table]:
    """The first entry's value, and the probabilities around the mode; what is left out is below 2^-120."""
    reach = math.ceil(_REACH * math.sqrt(mean)) + 100
    mode = math.floor(mean)
    first = max(0, mode - reach)
    with localcontext() as context:
        context.prec = 50
        exact = Decimal(mean)
        up: list[Decimal] = [Decimal(1)]
        down: list[Decimal] = []
        for k in range(mode + 1, mode + reach):
            up.append(up[-1] * exact / k)
        for k in range(mode, first, -1):
            down.append((down[-1] if down else up[0]) * k / exact)
        return first, _table(down[::-1] + up)


# --- Gaussians ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Staircase:
    """Stairs of width 2^log_width over the half-line, each as high as the density at its left end."""

    deviation: float
    discrete: bool
    log_width: int
    stairs: _Table

    def draw(self, random_bytes: RandomBytes, size: int) -> Integers:
        """Independent noise, int64 [size]."""
        result = np.empty(size, np.int64)
        done = 0
        while done < size:
            # A little more than is missing: of 41, 40 are accepted.
            missing = min(size - done, _CHUNK)
            accepted = self._try(random_bytes, missing + missing // 32 + 32)[:missing]
            result[done : done + len(accepted)] = accepted
            done += len(accepted)
        return result

    def _try(self, random_bytes: RandomBytes, count: int) -> Integers:
        """One attempt each; those that were accepted."""
        first = integers(random_bytes, count, np.uint16)
        place, coin = integers(random_bytes, count, np.uint32), integers(random_bytes, count, np.uint32)
        stair = _pick(self.stairs, first >> np.uint16(16 - _GUIDE_BITS), random_bytes)
        along = self._along(place)
        scale = np.float32((2.0**self.log_width / self.deviation) ** 2 / 2)
        probability = np.exp(-scale * along * (np.float32(2) * stair.astype(np.float32) + along))
        difference = probability - _fraction(coin)
        accepted: Coins = difference > 0
        further = self._further(random_bytes, count)
        for unclear in np.flatnonzero(np.abs(difference) <= _CLEAR).tolist():
            rest = int(further[unclear]) if further is not None else None
            accepted[unclear] = self._settle(
                int(stair[unclear]), int(place[unclear]), int(coin[unclear]), rest, random_bytes
            )
        value = self._value(stair, place, further)
        # 0 or -1, which has all bits set: value or -value, in two's complement.
        sign = -(first & np.uint16(1)).astype(np.int64)
        if self.discrete:
            accepted &= (value | ~sign) != 0
        value ^= sign
        value -= sign
        kept: Integers = value[accepted]
        return kept

    def _along(self, place: Unsigned) -> Singles:
        """In widths of a stair; the discrete ones stand on integers only."""
        if self.discrete and self.log_width < 32:
            place = place & np.uint32((2**self.log_width - 1) << (32 - self.log_width))
        return _fraction(place)

    def _further(self, random_bytes: RandomBytes, count: int) -> npt.NDArray[np.uint32] | None:
        """Further bits of the places, where a stair is so wide that its integers need them."""
        return integers(random_bytes, count, np.uint32) if self.log_width > 31 else None

    def _value(self, stair: Entries, place: Unsigned, further: Unsigned | None) -> Integers:
        """Integer part, or to the nearest integer."""
        value = stair.astype(np.int64)
        # In halves.
        if self.log_width < 0:
            value >>= -self.log_width - 1
        elif further is None:
            value <<= self.log_width + 1
            value += place >> np.uint32(31 - self.log_width)
        else:
            value <<= self.log_width + 1
            value += (place.astype(np.int64) << (self.log_width - 31)) + (further >> np.uint32(63 - self.log_width))
        if not self.discrete:
            value += 1
        value >>= 1
        return value

    def _settle(self, stair: int, place: int, coin: int, further: int | None, random_bytes: RandomBytes) -> bool:
        """Whether coin < probability: in float64 where that is clear, else exactly."""
        bits = 32
        if further is not None:
            place, bits = (place << 32) + further, 64
            coin = (coin << 32) + int(integers(random_bytes, 1, np.uint32)[0])
        whole = place >> (bits - self.log_width) if self.log_width >= 0 else 0
        along = whole * 2.0**-self.log_width if self.discrete else place * 2.0**-bits
        scale = (2.0**self.log_width / self.deviation) ** 2 / 2
        difference = math.exp(-scale * along * (2.0 * stair + along)) - coin * 2.0**-bits
        return difference > 0 if abs(difference) > _CLEAR_64 else self._decide(stair, place, coin, bits, random_bytes)

    def _decide(self, stair: int, place: int, coin: int, bits: int, random_bytes: RandomBytes) -> bool:
        """Whether coin < probability, of both of which so many bits are known, in as many as it takes."""
        width = Fraction(2) ** self.log_width
        scale = width**2 / (2 * Fraction(self.deviation) ** 2)
        if self.discrete:
            whole = place >> (bits - self.log_width) if self.log_width >= 0 else 0
            exact = Fraction(whole) / width
        while True:
            one = Fraction(1, 2**bits)
            low, high = (exact, exact) if self.discrete else (place * one, (place + 1) * one)
            least = _exp_bounds(-scale * high * (2 * stair + high), bits)[0]
            most = _exp_bounds(-scale * low * (2 * stair + low), bits)[1]
            if (coin + 1) * one <= least:
                return True
            if coin * one >= most:
                return False
            place = (place << 64) + int(words(random_bytes, 1)[0])
            coin = (coin << 64) + int(words(random_bytes, 1)[0])
            bits += 64


def _fraction(bits: Unsigned) -> Singles:
    """The leading 24 of 32 bits, as a fraction of 1: exact in float32."""
    leading: Singles = (bits >> np.uint32(8)).view(np.int32).astype(np.float32)
    leading *= np.float32(2.0**-24)
    return leading


@lru_cache(maxsize=64)
def _staircase(deviation: float, *, discrete: bool) -> _Staircase:
    log_width = math.floor(math.log2(deviation)) - 4
    if discrete:
        log_width = max(0, log_width)
    width = 2.0**log_width
    with localcontext() as context:
        context.prec = 60
        scale = Decimal(width) ** 2 / (2 * Decimal(deviation) ** 2)
        count = math.ceil(_REACH * deviation / width) + 2
        return _Staircase(deviation, discrete, log_width, _table([(-scale * j * j).exp() for j in range(count)]))


def _exp_bounds(exponent: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Bounds of e^exponent, for an exponent of at most 0, closer together than 2^-bits."""
    with localcontext() as context:
        context.prec = bits // 3 + 30
        value = (Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
    error = Fraction(1, 2 ** (bits + 8))
    return Fraction(value) - error, Fraction(value) + error


def chunks(noise: Noise, random_bytes: RandomBytes, size: int) -> Iterator[tuple[slice, Integers]]:
    """The noise of a long vector in parts, so that it is never in memory whole."""
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        yield slice(start, stop), noise(random_bytes, stop - start)

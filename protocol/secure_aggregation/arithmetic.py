"""From float32 values to integers modulo 2^b whose sum cannot overflow, and from their sum back to the mean.

A client's vector has `count` values and a tail. All are sums of integers; nothing but their sums is ever seen.

Values. Client i of weight w_i, at most W, sends  q = round((w_i / W) * value / step)  with step = range / L,
rounded up or down at random without bias, and clipped to [-L, L]. The range is the same for all clients, so
sum(q_i) * step / sum(w_i / W)  is the weighted mean. What was clipped or rounded away stays in the client's error
feedback.

Noise. A client may add an integer z with |z| <= B to each value before it is masked, so that the sum is private
from the server, too (`noise`, below).

The tail. Weights, and how many values lie in which octave of the range (so that the next round's range fits),
are non-negative integers. Each is written in digits of c bits, and the digits are summed.

**The sum cannot overflow.** With n clients a value's sum S has |S| <= n (L + B), and b is the smallest number
with  2 n (L + B) + 1 <= 2^b.  So the 2 n (L + B) + 1 possible sums are different modulo 2^b, and the
representative of S in [-2^(b-1), 2^(b-1)) is S itself: n (L + B) <= (2^b - 1) / 2, and being an integer it is at
most 2^(b-1) - 1. A digit is at most 2^c - 1, where c is the largest number with  n (2^c - 1) <= 2^b - 1,  so a sum
of digits is its own representative in [0, 2^b). Fewer clients than n only make the sums smaller. Clients whose
contributions are missing contribute nothing; so whichever subset is summed, the result is exact. (c >= 1 since
n <= 2^b - 1, as L >= 1.) For a client that does not keep to [-L, L] nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgetrain.protocol.codecs.hashing import STREAM_ROUNDING, uniform
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.privacy.clipping import clip_to_grid
from edgetrain.protocol.secure_aggregation.masks import Words, word_type
from edgetrain.protocol.vectors import Vector

Integers = npt.NDArray[np.int64]

Noise = Callable[[int], Integers]
"""Integers to add to so many values, int64 [count], none larger in magnitude than the `noise_bound` of the round."""

LARGEST = {"int8": 127, "int4": 7}
MAX_BITS = 64
# Octaves around the range in which values are counted: from 2^-7 and below up to 2^8 and above.
OCTAVES = tuple(range(-7, 9))


class Quantizer(msgspec.Struct, frozen=True, kw_only=True):
    """How all clients of a round write their values."""

    kind: Literal["int8", "int4"] = "int8"
    # The largest magnitude of a weighted value that is not clipped.
    range: float
    # Weights beyond this count as this; 0: all clients count the same, and no weights are summed.
    max_weight: int = 0
    # Count the values by octave.
    octaves: bool = False
    # No client's noise is larger in magnitude.
    noise_bound: int = 0
    # The largest integer that stands for a value (L), where it is less than the kind's own; 0: that.
    largest: Annotated[int, Meta(ge=0, le=127)] = 0

    @property
    def levels(self) -> int:
        """L."""
        return self.largest or LARGEST[self.kind]

    @property
    def step(self) -> float:
        """What an integer stands for."""
        return self.range / self.levels


@dataclass(frozen=True, slots=True)
class Layout:
    """What is summed: `count` values and a tail, modulo 2^bits.

    Attributes:
        count: values.
        bits: of the modulus (b).
        digit_bits: of a digit of the tail (c).
        weight_digits: digits of the weight; 0 where it is not summed.
        octave_digits: digits of one octave's count; 0 where they are not summed.
    """

    count: int
    bits: int
    digit_bits: int
    weight_digits: int
    octave_digits: int

    @property
    def length(self) -> int:
        """Of the whole vector."""
        return self.count + self.weight_digits + len(OCTAVES) * self.octave_digits

    @property
    def payload_bytes(self) -> int:
        """Of the packed vector."""
        return -(-self.length * self.bits // 8)


def make_layout(quantizer: Quantizer, *, count: int, clients: int) -> Layout:
    """The layout for a number of clients.

    Raises:
        SecureAggregationError: the sum does not fit into 64 bits, or there is nothing to sum.
    """
    if count < 1 or clients < 1:
        raise SecureAggregationError("nothing to sum")
    if not (math.isfinite(quantizer.range) and quantizer.range > 0):
        raise SecureAggregationError(f"a range of {quantizer.range} for the values")
    bits = (2 * clients * (quantizer.levels + quantizer.noise_bound)).bit_length()
    if bits > MAX_BITS:
        raise SecureAggregationError(f"the sum of {clients} clients needs {bits} bits, {MAX_BITS} is the most")
    digit_bits = ((2**bits - 1) // clients + 1).bit_length() - 1
    return Layout(
        count,
        bits,
        digit_bits,
        -(-quantizer.max_weight.bit_length() // digit_bits),
        -(-count.bit_length() // digit_bits) if quantizer.octaves else 0,
    )


def finest(kind: Literal["int8", "int4"], *, clients: int, bits: int) -> int:
    """The largest L of a kind with which the sum of so many clients fits into so many bits; 0 for none."""
    return min(LARGEST[kind], ((1 << bits) - 1) // (2 * clients))


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """One client's contribution before it is masked.

    Attributes:
        integers: int64 [layout.length], the tail included.
        decoded: float32 [count], what of the client's values the mean will hold, in the values' own unit.
    """

    integers: Integers
    decoded: Vector


def quantize(
    values: Vector,
    weight: int,
    quantizer: Quantizer,
    layout: Layout,
    *,
    seed: int,
    noise: Noise | None = None,
    exact_norm: float = 0.0,
) -> Quantized:
    """A client's contribution.

    Args:
        values: float32 [count].
        weight: of this client, e.g. its number of examples; clipped to the round's largest.
        quantizer: of the round.
        layout: of the session.
        seed: for rounding.
        exact_norm: L2 norm that the integers keep to after rounding, then to the nearest; 0 for no such norm.
        noise: added to the values before they are masked; it stays out of `decoded`.

    Raises:
        SecureAggregationError: values that are not finite, or noise beyond the bound of the round.
    """
    if len(values) != layout.count or not np.isfinite(values).all():
        raise SecureAggregationError("values that are not finite or not as many as agreed cannot be summed")
    share = min(weight, quantizer.max_weight) / quantizer.max_weight if quantizer.max_weight else 1.0
    largest, step = quantizer.levels, quantizer.step
    scaled = values.astype(np.float64) * (share / step)
    if exact_norm:
        rounded = clip_to_grid(scaled, exact_norm / step, 1.0)[0].astype(np.float64)
    else:
        rounded = np.floor(scaled + uniform(seed, STREAM_ROUNDING, len(scaled)).astype(np.float64))
    integers = np.clip(rounded, -largest, largest).astype(np.int64)
    decoded = (integers * (step / share)).astype(np.float32)
    if noise is not None:
        integers = integers + _checked_noise(noise(layout.count), layout.count, quantizer.noise_bound)
    tail: list[int] = []
    if layout.weight_digits:
        tail += _digits(min(weight, quantizer.max_weight), layout.weight_digits, layout.digit_bits)
    if layout.octave_digits:
        for number in count_octaves(scaled / largest):
            tail += _digits(number, layout.octave_digits, layout.digit_bits)
    return Quantized(np.concatenate([integers, np.array(tail, np.int64)]), decoded)


@dataclass(frozen=True, slots=True, eq=False)
class Total:
    """The sum of all contributions.

    Attributes:
        integers: int64 [count], the sums of the values.
        weight: sum of the weights; the number of clients where all count the same.
        octaves: how many values but zeros lay in each of `OCTAVES`; empty where they were not counted.
        mean: float64 [count], the weighted mean.
    """

    integers: Integers
    weight: int
    octaves: tuple[int, ...]
    mean: npt.NDArray[np.float64]


def dequantize(words: Words, clients: int, quantizer: Quantizer, layout: Layout) -> Total:
    """The mean from the unmasked sum.

    Args:
        words: [layout.length], modulo 2^bits or more.
        clients: how many contributions it is the sum of.
        quantizer: of the round.
        layout: of the session.

    Raises:
        SecureAggregationError: what no honest clients sum up to.
    """
    residues = words & word_type(layout.bits).type(2**layout.bits - 1)
    integers = _centred(residues[: layout.count], layout.bits)
    tail = residues[layout.count :].tolist()
    weight = clients
    if layout.weight_digits:
        weight = _number(tail[: layout.weight_digits], layout.digit_bits)
        if not 1 <= weight <= clients * quantizer.max_weight:
            raise SecureAggregationError(f"weights that sum up to {weight}: a client did not keep to the protocol")
    octaves = tail[layout.weight_digits :]
    counts = tuple(
        _number(octaves[start : start + layout.octave_digits], layout.digit_bits)
        for start in range(0, len(octaves), max(layout.octave_digits, 1))
    )
    if sum(counts) > clients * layout.count:
        raise SecureAggregationError("counts of values that do not add up: a client did not keep to the protocol")
    shares = weight / quantizer.max_weight if quantizer.max_weight else weight
    return Total(integers, weight, counts, integers.astype(np.float64) * (quantizer.step / shares))


def count_octaves(relative: npt.NDArray[np.float64]) -> list[int]:
    """How many values lie in each of `OCTAVES`: octave e counts magnitudes in (2^(e-1), 2^e], of 1 = the range.

    Zeros are in none.
    """
    magnitudes = np.abs(relative)
    positive = magnitudes[magnitudes > 0]
    exponents = np.clip(np.ceil(np.log2(positive)), OCTAVES[0], OCTAVES[-1]).astype(np.int64)
    counts: list[int] = np.bincount(exponents - OCTAVES[0], minlength=len(OCTAVES)).tolist()
    return counts


def next_range(current: float, octaves: tuple[int, ...], *, clipped: float) -> float:
    """The range of the next round: the smallest power of two times the current one that clips at most a share.

    Args:
        current: range of this round.
        octaves: of all clients' values.
        clipped: allowed share of values beyond the range.
    """
    total = sum(octaves)
    if not total:
        return current
    beyond = total
    for octave, number in zip(OCTAVES, octaves, strict=True):
        beyond -= number
        if beyond <= clipped * total:
            return float(np.clip(current * 2.0**octave, 2.0**-60, 2.0**60))
    raise AssertionError("nothing is beyond the last octave")


def pack(integers: Integers | Words, layout: Layout) -> bytes:
    """Residues modulo 2^bits, `bits` each, the lowest first, without gaps."""
    words = np.asarray(integers).astype(np.uint64)
    matrix = words.astype("<u8").view(np.uint8).reshape(len(words), 8)
    bits = np.unpackbits(matrix, axis=1, bitorder="little", count=layout.bits)
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack(data: bytes, layout: Layout) -> Words:
    """The opposite.

    Raises:
        SecureAggregationError: another length, or bits behind the last that are not 0.
    """
    if len(data) != layout.payload_bytes:
        raise SecureAggregationError(f"a masked vector of {len(data)} bytes, expected were {layout.payload_bytes}")
    size = layout.length * layout.bits
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[size:].any():
        raise SecureAggregationError("a masked vector with bits behind its end")
    kind = word_type(layout.bits)
    matrix = np.zeros((layout.length, 8 * kind.itemsize), np.uint8)
    matrix[:, : layout.bits] = bits[:size].reshape(layout.length, layout.bits)
    return np.packbits(matrix, axis=1, bitorder="little").reshape(-1).view(kind)


def _checked_noise(noise: Integers, count: int, bound: int) -> Integers:
    if noise.shape != (count,) or noise.dtype != np.int64 or np.abs(noise).max(initial=0) > bound:
        raise SecureAggregationError(f"noise is {count} 64-bit integers of magnitude {bound} at most")
    return noise


def _centred(residues: Words, bits: int) -> Integers:
    signed = residues.astype(np.uint64).astype(np.int64)
    if bits == MAX_BITS:
        return signed
    return np.where(signed >= 1 << (bits - 1), signed - (1 << bits), signed)


def _digits(number: int, count: int, bits: int) -> list[int]:
    return [number >> (bits * place) & (2**bits - 1) for place in range(count)]


def _number(digits: list[int], bits: int) -> int:
    return sum(digit << (bits * place) for place, digit in enumerate(digits))

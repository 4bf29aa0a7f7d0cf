"""Values to integers and a scale per block, and back.

A scale is a bfloat16, the upper half of a float32: any range, and eight significant bits, so that scale times
an 8-bit code is exact in float32 and every language decodes the same bits.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.blocks import from_bfloat16
from edgetrain.protocol.codecs.hashing import STREAM_ROUNDING, uniform
from edgetrain.protocol.codecs.result import Bytes, Indices
from edgetrain.protocol.errors import CodecError
from edgetrain.protocol.vectors import Vector

Scales = npt.NDArray[np.uint16]
Codes = npt.NDArray[np.int8]

LARGEST = {"int8": 127, "int4": 7}
"""The largest code; codes are symmetric, so that -128 and -8 are not used."""

_FINITE = 0x7F7F
_BITS, _FLOAT = struct.Struct("<I"), struct.Struct("<f")
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def to_integers(
    values: Vector, starts: Indices, largest: int, *, stochastic: bool, seed: int, quantizer: str
) -> tuple[Scales, Codes]:
    """Codes in [-largest, largest] and the scales of the blocks that begin at `starts`.

    A block's scale is its largest magnitude / `largest`, rounded up to a bfloat16. The error of a value is at
    most half its block's scale to nearest, below one scale if stochastic (and 0 in expectation).

    Raises:
        CodecError: values too large for a finite product.
    """
    peaks = np.maximum.reduceat(np.abs(values), starts) if len(values) else values
    bits = ((peaks / np.float32(largest)).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)
    # The division may underflow to 0; the smallest bfloat16 still bounds the error.
    scales = np.maximum(bits, peaks > 0).astype(np.uint16)
    try:
        check_scales(scales, largest)
    except CodecError as error:
        raise CodecError(
            f"a delta with values up to {peaks.max():.3g} is too large for {quantizer}: training "
            "diverged, or use float32"
        ) from error
    step = from_bfloat16(scales)
    step[step == 0] = 1
    ratio = values / _spread(step, starts, len(values))
    rounded = np.floor(ratio + uniform(seed, STREAM_ROUNDING, len(ratio))) if stochastic else np.rint(ratio)
    return scales, np.clip(rounded, -largest, largest).astype(np.int8)


def from_integers(codes: Codes, scales: Scales, starts: Indices) -> Vector:
    """The product of each code and its block's scale; exact."""
    values = codes.astype(np.float32)
    values *= _spread(from_bfloat16(scales), starts, len(codes))
    return values


def to_signs(values: Vector, starts: Indices) -> tuple[Scales, Bytes]:
    """Mean magnitude per block, and 1 for each negative value (Karimireddy et al. 2019; with one block: STC).

    Raises:
        CodecError: a mean that no bfloat16 holds.
    """
    sums = np.add.reduceat(np.abs(values), starts, dtype=np.float64) if len(values) else values
    means = (sums / _lengths(starts, len(values))).astype(np.float32)
    scales = ((means.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    check_scales(scales, 1)
    return scales, (values < 0).astype(np.uint8)


def from_signs(negative: Bytes, scales: Scales, starts: Indices) -> Vector:
    """Plus or minus the block's scale."""
    magnitude = _spread(from_bfloat16(scales), starts, len(negative))
    return np.where(negative, -magnitude, magnitude)


def check_scales(scales: Scales, largest: int) -> float:
    """The largest of them; refuses scales that are negative, or whose product with `largest` is not finite."""
    if not len(scales):
        return 0.0
    # Of scales that are not negative, the order is that of their bits.
    top = int(np.maximum.reduce(scales))
    (scale,) = _FLOAT.unpack(_BITS.pack(top << 16))
    if top > _FINITE or scale * largest > _LARGEST_FLOAT:
        raise CodecError(f"scale 0x{top:04x}: its values would not be finite")
    return float(scale)


def _spread(scales: Vector, starts: Indices, count: int) -> Vector:
    return np.repeat(scales, _lengths(starts, count))


def _lengths(starts: Indices, count: int) -> Indices:
    """Of the blocks; `np.diff` with `append` copies `starts` first."""
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1:] = count - starts[-1:]
    return lengths

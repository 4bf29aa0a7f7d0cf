"""Which entries of a delta are sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.hashing import STREAM_RANDOM_K, counter_hash
from edgetrain.protocol.codecs.result import Indices
from edgetrain.protocol.codecs.spec import CodecSpec
from edgetrain.protocol.vectors import Vector

_ABS = np.uint32(0x7FFFFFFF)


def magnitude_bits(delta: Vector) -> npt.NDArray[np.uint32]:
    """The absolute values as unsigned integers: same order as the floats, infinities and NaN on top."""
    return delta.view(np.uint32) & _ABS


def select(spec: CodecSpec, delta: Vector, tensors: Indices, seed: int) -> Indices | None:
    """Ascending positions that are sent, int64 [m]; None for all of them.

    Args:
        spec: the codec.
        delta: float32 [n], finite.
        tensors: boundaries of the tensors, int64 [t + 1], from 0 to n.
        seed: for randk.
    """
    size = len(delta)
    if spec.select == "topk":
        magnitudes = magnitude_bits(delta)
        spans = _spans(tensors) if spec.per_tensor else iter([(0, size)])
        found = [start + top_k(magnitudes[start:stop], count_of(spec, stop - start)) for start, stop in spans]
        return np.concatenate([np.zeros(0, np.int64), *found])
    if spec.select == "threshold":
        assert spec.amount is not None
        # Rounded down, so that a float32 is above it just when it is above the number asked for.
        threshold = np.float32(spec.amount) if spec.amount <= float(np.finfo(np.float32).max) else np.float32(np.inf)
        if float(threshold) > spec.amount:
            threshold = np.nextafter(threshold, np.float32(0))
        return np.flatnonzero(magnitude_bits(delta) > threshold.view(np.uint32))
    if spec.select == "randk":
        return random_k(size, count_of(spec, size), seed)
    return None


def count_of(spec: CodecSpec, size: int) -> int:
    """How many of `size` entries topk or randk takes."""
    assert spec.amount is not None
    count = spec.amount if isinstance(spec.amount, int) else max(1, round(spec.amount * size))
    return min(count, size)


def top_k(magnitudes: npt.NDArray[np.uint32], count: int) -> Indices:
    """Positions of the `count` largest, ascending; of equal ones the first, and never a zero."""
    size = len(magnitudes)
    if count == 0:
        return np.zeros(0, np.int64)
    smallest = np.partition(magnitudes, size - count)[size - count] if count < size else np.uint32(0)
    if smallest == 0:
        return np.flatnonzero(magnitudes)
    positions = np.flatnonzero(magnitudes >= smallest)
    if len(positions) > count:
        is_tie = magnitudes[positions] == smallest
        surplus = np.flatnonzero(is_tie)[count - len(positions) :]
        positions = np.delete(positions, surplus)
    return positions


def random_k(size: int, count: int, seed: int) -> Indices:
    """One position from each of `count` equal strata, ascending: what a seed stands for on the wire.

    Stratum j reaches from floor(j * size / count) up to floor((j + 1) * size / count); the position within it
    is the top half of the 64-bit product of its length and `counter_hash(seed, 1, j)`.
    """
    bounds = np.arange(count + 1, dtype=np.uint64) * np.uint64(size) // np.uint64(max(count, 1))
    hashes = counter_hash(seed, STREAM_RANDOM_K, count).astype(np.uint64)
    offsets = (hashes * np.diff(bounds)) >> np.uint64(32)
    return (bounds[:-1] + offsets).astype(np.int64)


def _spans(tensors: Indices) -> Iterator[tuple[int, int]]:
    bounds = tensors.tolist()
    return itertools.pairwise(bounds)

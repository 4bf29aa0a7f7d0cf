"""Parameters in one byte: a weight as int8 with a scale for each row, everything else as float32.

A row is one output channel: what shares the first index. Its scale is its largest value / 127, rounded up to the 11
significant bits of a float16, so that a multiple of up to 127 is exact in float32, and what was rounded once is rounded
to itself.
Which parameters are kept so says `ParameterEntry.dtype`.

A file of initial parameters holds every parameter in manifest order, int8 or little-endian float32, then the float32
scales of those in int8, in the same order; without any, it is the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.vectors import Vector

if TYPE_CHECKING:
    from edgetrain.protocol.manifest import ParameterEntry

Array = npt.NDArray[np.generic]

# The largest whole number, so that the range is the same on both sides.
LARGEST = 127
# Significant bits of a scale.
_BITS = 11
# Elements that are rounded at a time.
_BLOCK = 1 << 16
# Below it a float32 is denormal: no scale is smaller.
_TINY = float(np.finfo(np.float32).tiny)


def row_scales(largest: npt.NDArray[np.floating], room: float = 1.0) -> Vector:
    """Scales of rows with these largest absolute values, times `room`; 1 for a row of zeros.

    The shape is kept. A scale times 127 is never below the largest value.
    """
    mantissa, exponent = np.frexp(largest.astype(np.float64) * (room / LARGEST))
    scale = np.maximum(np.ldexp(np.ceil(mantissa * 2**_BITS) / 2**_BITS, exponent), _TINY)
    return np.where(largest > 0, scale, 1).astype(np.float32)


def nearest(weight: Vector) -> tuple[npt.NDArray[np.int8], Vector]:
    """A weight [O, ...] rounded to whole numbers of the same shape, and its scales [O, 1, ...]."""
    whole = np.empty(weight.shape, np.int8)
    scale = np.empty((len(weight), *[1] * (weight.ndim - 1)), np.float32)
    # Some rows at a time: as float32 it may be in memory once, not four times.
    count = max(1, _BLOCK // max(1, weight.size // max(1, len(weight))))
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        largest = np.abs(weight[rows]).max(axis=tuple(range(1, weight.ndim)), keepdims=True, initial=0)
        scale[rows] = row_scales(largest)
        whole[rows] = np.rint(weight[rows] / scale[rows])
    return whole, scale


def representable(vector: Vector, entries: Iterable[ParameterEntry]) -> Vector:
    """The flat vector with every parameter in int8 rounded, fresh memory."""
    result = vector.copy()
    for entry in entries:
        if entry.dtype == "int8":
            whole, scale = nearest(entry.of(vector))
            entry.of(result)[...] = whole * scale
    return result


def graph_inputs(vector: Vector, entries: Sequence[ParameterEntry]) -> list[Array]:
    """The first inputs of a graph: every parameter in manifest order, then the scales of those in int8."""
    arrays: list[Array] = []
    scales: list[Array] = []
    for entry in entries:
        part = entry.of(vector)
        if entry.dtype == "int8":
            whole, scale = nearest(part)
            arrays.append(whole)
            scales.append(scale.ravel())
        else:
            arrays.append(part)
    return arrays + scales


def file_size(entries: Iterable[ParameterEntry]) -> int:
    """Bytes of a file of initial parameters."""
    return sum(entry.numel + 4 * entry.shape[0] if entry.dtype == "int8" else 4 * entry.numel for entry in entries)


def encode_parameters(vector: Vector, entries: Sequence[ParameterEntry]) -> bytes:
    """The file of a flat vector. Parameters in int8 are rounded to the nearest."""
    arrays = graph_inputs(vector, entries)
    return b"".join(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes() for array in arrays)


def decode_parameters(data: bytes, entries: Sequence[ParameterEntry]) -> Vector:
    """The flat vector of a file whose size was checked, a fresh writable copy."""
    vector = np.empty(sum(entry.numel for entry in entries), np.float32)
    offset = 0
    for entry in entries:
        dtype = np.dtype(entry.dtype).newbyteorder("<")
        entry.of(vector)[...] = np.frombuffer(data, dtype, entry.numel, offset).reshape(entry.shape)
        offset += entry.numel * dtype.itemsize
    for entry in entries:
        if entry.dtype == "int8":
            scales = np.frombuffer(data, "<f4", entry.shape[0], offset)
            entry.of(vector)[...] *= scales.reshape(-1, *[1] * (len(entry.shape) - 1))
            offset += scales.nbytes
    return vector

"""Rice coding of ascending positions (Rice and Plaunt 1971; Golomb 1966).

A gap g is `g >> k` in unary and its k low bits as they are. The two parts stand in two streams, unary first,
so that both ends work on whole arrays; a decoder that goes bit by bit needs two cursors.
"""

from __future__ import annotations

import numpy as np

from edgetrain.protocol.codecs.bits import Reader, pack_integers, pack_unary, pack_varint
from edgetrain.protocol.codecs.result import Indices
from edgetrain.protocol.errors import CodecError

# Two bits more than any 32-bit gap asks for, and small enough that 2^32 gaps cannot overflow an int64.
_MAX_PARAMETER = 30


def encode_positions(positions: Indices) -> bytes:
    """Strictly ascending positions as one byte k, the sum of all quotients, quotients, remainders."""
    if not len(positions):
        return b""
    gaps = np.diff(positions, prepend=-1) - 1
    k = _best_parameter(gaps)
    quotients = gaps >> k
    return bytes([k]) + pack_varint(int(quotients.sum())) + pack_unary(quotients) + pack_integers(gaps, k)


def decode_positions(reader: Reader, count: int, size: int) -> Indices:
    """The inverse: `count` strictly ascending positions below `size`.

    Raises:
        CodecError: truncated, or no such positions.
    """
    if not count:
        return np.zeros(0, np.int64)
    k = reader.byte("Rice parameter")
    if k > _MAX_PARAMETER:
        raise CodecError(f"Rice parameter {k}, at most {_MAX_PARAMETER} is allowed")
    total = reader.varint((size - count) >> k, "sum of the Rice quotients")
    ends = reader.ones(total + count, "Rice quotients")
    if len(ends) != count or ends[-1] != total + count - 1:
        raise CodecError(f"Rice quotients: not {count} unary numbers that add up to {total}")
    # The sum of the quotients so far, and of the remainders.
    steps = np.arange(count)
    positions: Indices = ends - steps
    positions <<= k
    positions += steps
    positions += reader.integers(count, k, "Rice remainders").cumsum()
    if positions[-1] >= size:
        raise CodecError(f"position {positions[-1]} in a vector of {size}")
    return positions


def _best_parameter(gaps: Indices) -> int:
    """The k that gives the fewest bits; the cost is convex in k, so walk down from the mean."""

    def cost(k: int) -> int:
        return int((gaps >> k).sum()) + len(gaps) * k

    k = min(_MAX_PARAMETER, int(gaps.mean()).bit_length())
    best = cost(k)
    while k and (lower := cost(k - 1)) <= best:
        k, best = k - 1, lower
    return k

"""Which parameters a round sums: the same for all clients, or their masks would not cancel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.bits import Reader, pack_varint
from edgetrain.protocol.codecs.rice import decode_positions, encode_positions
from edgetrain.protocol.codecs.selection import magnitude_bits, random_k, top_k
from edgetrain.protocol.errors import CodecError, SecureAggregationError
from edgetrain.protocol.secure_aggregation.messages import Settings

Positions = npt.NDArray[np.int64]


def support_of(settings: Settings, num_parameters: int, positions: bytes = b"") -> Positions:
    """Ascending positions, int64 [settings.count].

    Args:
        settings: of the round.
        num_parameters: length of the flat vector.
        positions: what the coordinator has chosen from the last sum, if the settings name such a blob.

    Raises:
        SecureAggregationError: there is no such support.
    """
    count = settings.count
    if count > num_parameters:
        raise SecureAggregationError(f"a support of {count} parameters, the model has {num_parameters}")
    if count == num_parameters:
        return np.arange(num_parameters, dtype=np.int64)
    if not settings.positions:
        return random_k(num_parameters, count, settings.seed)
    return _with_random(_decode(positions, num_parameters, count), num_parameters, count, settings.seed)


def choose_positions(last_sum: npt.NDArray[np.float32], count: int) -> bytes:
    """The largest of the last sum, encoded: for `support_of`, which fills up with random ones.

    Args:
        last_sum: float32 [num_parameters].
        count: how many; zeros are left out.
    """
    positions = top_k(magnitude_bits(last_sum), count)
    return pack_varint(len(positions)) + encode_positions(positions)


def _with_random(chosen: Positions, size: int, count: int, seed: int) -> Positions:
    """Further ones, uniform among the rest."""
    rest = np.setdiff1d(np.arange(size, dtype=np.int64), chosen, assume_unique=True)
    further = rest[random_k(len(rest), count - len(chosen), seed)]
    return np.sort(np.concatenate([chosen, further]))


def _decode(data: bytes, size: int, count: int) -> Positions:
    try:
        reader = Reader(data)
        number = reader.varint(count, "number of positions")
        chosen = decode_positions(reader, number, size)
        reader.finish()
        return chosen
    except CodecError as error:
        raise SecureAggregationError(f"the positions of the support do not decode: {error}") from error

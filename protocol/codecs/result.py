"""What a decoder gives, and what it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.blocks import BlockCodes
from edgetrain.protocol.errors import CodecError
from edgetrain.protocol.vectors import Vector

Indices = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAX_PARAMETERS = 2**32 - 1
"""Positions are 32-bit on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a decoder may take; checked before any memory is taken.

    Attributes:
        max_parameters: the longest vector that is accepted.
        max_bytes: the longest payload, before and after decompression; None for the largest that any codec
            needs for `max_parameters` (an index and a float32 each).
    """

    max_parameters: int
    max_bytes: int | None = None

    @property
    def payload_bytes(self) -> int:
        """`max_bytes`, or what it stands for."""
        return 8 * self.max_parameters + 1024 if self.max_bytes is None else self.max_bytes


class SparseOrDense:
    """A decoded vector, not to be changed. All values are finite.

    Args:
        num_parameters: length of the whole vector.
        indices: int64 [m], strictly ascending positions of `values`; None if dense (m = num_parameters).
        values: float32 [m]; everything else is 0. Dense ones may still be codes: whoever asks gets floats.
    """

    __slots__ = ("_values", "blocks", "indices", "num_parameters")

    def __init__(self, num_parameters: int, indices: Indices | None, values: Vector | BlockCodes) -> None:
        self.num_parameters = num_parameters
        self.indices = indices
        # The codes, where it came so.
        self.blocks = values if isinstance(values, BlockCodes) else None
        self._values = None if isinstance(values, BlockCodes) else values

    @property
    def values(self) -> Vector:
        """float32 [m]."""
        if self._values is None:
            assert self.blocks is not None, "one of both is there"
            self._values = self.blocks.values()
        return self._values

    def dense(self) -> Vector:
        """The whole vector, float32 [num_parameters]; never a view of this object."""
        if self.indices is None:
            return self.values.copy()
        vector = np.zeros(self.num_parameters, np.float32)
        vector[self.indices] = self.values
        return vector

    def add_to(self, vector: npt.NDArray[np.floating[Any]], scale: float = 1.0) -> None:
        """`vector += scale * self` in place, in the dtype of `vector`; touches only what was sent.

        Raises:
            CodecError: `vector` has another length.
        """
        if vector.shape != (self.num_parameters,):
            raise CodecError(
                f"the update is for {self.num_parameters} parameters, not for an array of shape {vector.shape}"
            )
        values = self.values if scale == 1.0 else self.values * vector.dtype.type(scale)
        if self.indices is None:
            vector += values
        else:
            vector[self.indices] += values

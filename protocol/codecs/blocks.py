"""Codes of one byte with a scale for every so many of them: what most updates are before anybody needs floats."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.protocol.vectors import Vector


class BlockCodes(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The values of a vector as codes and scales, checked: all products are finite.

    Attributes:
        codes: int8 [n], within `largest` of 0.
        scales: bfloat16 bits, uint16 [ceil(n / size)], not negative; one for `size` codes each.
        size: of a block; the last may be shorter.
        largest: that a code's magnitude can be.
        top: the largest scale.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.uint16]
    size: int
    largest: int
    top: float

    def values(self) -> Vector:
        """The product of each code and its block's scale, float32 [n]; exact."""
        values = self.codes.astype(np.float32)
        values *= np.repeat(from_bfloat16(self.scales), self.size)[: len(values)]
        return values


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
    """bfloat16 bits to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)

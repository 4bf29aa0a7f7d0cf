"""Dense int8 updates that wait to be summed together: one matrix product for some of them, exact.

An element of the sum is the sum of codes times their blocks' units (weight * scale, in multiples of 2^-30). Where a
unit is an integer, nothing needs to be rounded. It is cut into digits of 12 bits: a digit times a code has 19 bits, and
the sum of 32 such products 24, which float32 holds exactly, in whatever order they are added.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.blocks import BlockCodes, from_bfloat16

_DIGIT_BITS = 12
_DIGIT = (1 << _DIGIT_BITS) - 1
# Updates that are summed together: 32 * 127 * 4095 < 2^24.
_MOST = 32
# Fewer are not worth it; and what they take in memory.
_LEAST = 4
_BYTES = 1 << 21
# Sizes of blocks for which one product after the other is fast, by one thread.
_SIZES = range(32, 1025)
# With these, a unit times a code is exact in a float64, and so was the float32 value times the weight.
_MOST_WEIGHT = 1 << 31
# Elements that are multiplied at a time, so that they stay in the processor's cache.
_PIECE = 1 << 16


class HeldBlocks:
    """Updates of one form.

    Args:
        blocks: the first of them.
    """

    def __init__(self, blocks: BlockCodes) -> None:
        self._form = (len(blocks.codes), blocks.size)
        self._room = room(len(blocks.codes))
        self._whole = len(blocks.codes) // blocks.size
        shape = len(blocks.scales), self._room, blocks.size
        # The end of the last block stays 0.
        self._codes = np.zeros(shape, np.int8)
        self._scales = np.zeros((self._room, len(blocks.scales)), np.uint16)
        self._factors = np.zeros((self._room, 1), np.float64)
        self._count = 0

    def takes(self, blocks: BlockCodes) -> bool:
        """Whether it is of the same form, and there is room."""
        return self._count < self._room and (len(blocks.codes), blocks.size) == self._form

    def hold(self, blocks: BlockCodes, factor: float) -> None:
        """Takes one; what makes its values units of the sum is `factor`, a weight times a power of two."""
        at, size, whole = self._count, blocks.size, self._whole
        self._codes[:whole, at] = blocks.codes[: whole * size].reshape(whole, size)
        if len(blocks.codes) > whole * size:
            self._codes[whole, at, : len(blocks.codes) - whole * size] = blocks.codes[whole * size :]
        self._scales[at] = blocks.scales
        self._factors[at] = factor
        self._count += 1

    def add_to(self, total: npt.NDArray[np.int64]) -> None:
        """Adds what is held, each product rounded to an integer by itself, and holds nothing any more."""
        count, self._count = self._count, 0
        if not count:
            return
        units = from_bfloat16(self._scales[:count]).astype(np.float64) * self._factors[:count]
        broken = units != np.rint(units)
        sums = np.zeros((len(self._codes), self._codes.shape[2]), np.int64)
        for at in np.flatnonzero(broken.any(axis=1)):
            blocks = slice(None) if broken[at].all() else np.flatnonzero(broken[at])
            products = self._codes[blocks, at].astype(np.float64)
            products *= units[at, blocks, np.newaxis]
            sums[blocks] += np.rint(products, out=products).astype(np.int64)
        units[broken] = 0
        digits = _digits(units.astype(np.int64).T)
        step = max(1, _PIECE // (count * self._codes.shape[2]))
        for start in range(0, len(sums), step):
            piece = slice(start, start + step)
            products = np.matmul(digits[piece], self._codes[piece, :count].astype(np.float32))
            for place in range(digits.shape[1]):
                sums[piece] += products[:, place].astype(np.int64) << (_DIGIT_BITS * place)
        total += sums.reshape(-1)[: len(total)]


def room(num_parameters: int) -> int:
    """How many updates of so many parameters are held."""
    return min(_MOST, _BYTES // max(num_parameters, 1))


def is_worth_holding(blocks: BlockCodes, weight: int) -> bool:
    """Whether `HeldBlocks` is for such an update."""
    return blocks.size in _SIZES and weight < _MOST_WEIGHT and room(len(blocks.codes)) >= _LEAST


def _digits(units: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Of integers that are not negative: float32 [blocks, digits, updates], the lowest digit first."""
    digits = []
    while units.any():
        digits.append((units & _DIGIT).astype(np.float32))
        units = units >> _DIGIT_BITS
    return np.stack(digits, axis=1) if digits else np.zeros((len(units), 0, units.shape[1]), np.float32)

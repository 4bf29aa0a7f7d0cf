"""Masks: a 256-bit key to a vector of words modulo a power of two, by ChaCha20 (RFC 8439).

The keystream is cut into little-endian words of 16, 32 or 64 bits, the fewest that hold the modulus; since that
is a power of two, the lower bits of a uniform word are uniform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

Words = npt.NDArray[np.unsignedinteger[Any]]

# A key makes one mask, so the counter and the nonce begin at 0.
_START = bytes(16)


def word_type(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The words that sums modulo 2^bits are made in; overflow beyond them does no harm."""
    return np.dtype("<u2" if bits <= 16 else "<u4" if bits <= 32 else "<u8")


class Masker:
    """Adds masks to a vector of words, and takes them off again.

    Args:
        count: length of the vectors.
        bits: of the modulus, 1 to 64.
    """

    def __init__(self, count: int, bits: int) -> None:
        self._type = word_type(bits)
        size = count * self._type.itemsize
        self._zeros = bytes(size)
        self._stream = bytearray(size)

    def zeros(self) -> Words:
        """A vector to begin with, [count]."""
        return np.frombuffer(self._zeros, self._type).copy()

    def add(self, vector: Words, key: bytes) -> None:
        """Adds the mask of a key, in place."""
        np.add(vector, self._expand(key), out=vector)

    def subtract(self, vector: Words, key: bytes) -> None:
        """Takes it off, in place."""
        np.subtract(vector, self._expand(key), out=vector)

    def _expand(self, key: bytes) -> Words:
        Cipher(ChaCha20(key, _START), mode=None).encryptor().update_into(self._zeros, self._stream)
        return np.frombuffer(self._stream, self._type)

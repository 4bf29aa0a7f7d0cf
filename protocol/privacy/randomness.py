"""Where noise comes from: bytes of a cryptographically strong generator.

Noise that can be predicted protects nobody, so nothing here is seeded by the plan or the run. Whoever needs the
same bytes twice (a test, a simulation) passes a `Keystream` of a known key.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

RandomBytes = Callable[[int], bytes]
"""`random_bytes(count)`: that many independent uniform bytes. `os.urandom` is one."""

Words = npt.NDArray[np.uint64]
Unsigned = TypeVar("Unsigned", np.uint16, np.uint32, np.uint64)


class Keystream:
    """The keystream of ChaCha20 (RFC 8439) under a 256-bit key, several times as fast as `os.urandom`.

    Args:
        key: 32 bytes; from the operating system if left out.
    """

    def __init__(self, key: bytes | None = None) -> None:
        nonce = bytes(16)
        self._stream = Cipher(algorithms.ChaCha20(key or os.urandom(32), nonce), mode=None).encryptor()

    def __call__(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._stream.update(bytes(count))


def integers(random_bytes: RandomBytes, count: int, kind: type[Unsigned]) -> npt.NDArray[Unsigned]:
    """Uniform unsigned integers of a kind, [count]."""
    width = np.dtype(kind)
    return np.frombuffer(random_bytes(width.itemsize * count), width.newbyteorder("<")).astype(kind, copy=False)


def words(random_bytes: RandomBytes, count: int) -> Words:
    """Uniform 64-bit words, uint64 [count]."""
    return integers(random_bytes, count, np.uint64)


def bernoulli(random_bytes: RandomBytes, probability: float, count: int) -> npt.NDArray[np.bool_]:
    """Independent coins, bool [count]; the probability is off by less than 2^-53 of itself or 2^-64."""
    if probability >= 1:
        return np.ones(count, np.bool_)
    return words(random_bytes, count) < np.uint64(int(probability * 2**64))


def sample(random_bytes: RandomBytes, population: int, size: int) -> npt.NDArray[np.int64]:
    """A uniformly random subset of `range(population)` of a size, sorted.

    The smallest of random 64-bit words win; a tie, of probability population^2 / 2^65, is drawn again.
    """
    while True:
        drawn = words(random_bytes, population)
        if len(np.unique(drawn)) == population:
            return np.sort(np.argsort(drawn)[:size])

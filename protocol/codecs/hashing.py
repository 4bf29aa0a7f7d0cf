"""The counter hash: the only randomness of the codecs, the same in every language.

It is a pure function of (seed, stream, counter), so any element can be computed alone and in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.errors import CodecError

Words = npt.NDArray[np.uint32]

STREAM_RANDOM_K = 1
STREAM_ROUNDING = 2

_MASK = 0xFFFFFFFF


def fmix32(x: Words) -> Words:
    """The finalizer of MurmurHash3 (Appleby 2011), in place: a bijection of 32-bit words."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def counter_hash(seed: int, stream: int, count: int) -> Words:
    """32 random bits for each counter 0..count-1, uint32 [count].

    With `lo` and `hi` the halves of the 64-bit seed and all sums modulo 2^32:

        a = fmix32(lo + fmix32(hi + fmix32(stream)));   b = fmix32(a + 0x9E3779B9)
        hash(i) = fmix32(fmix32(i + a) ^ b)

    Raises:
        CodecError: the seed is not in [0, 2^64).
    """
    if not 0 <= seed < 2**64:
        raise CodecError(f"a codec seed is an integer in [0, 2^64), not {seed}")
    a = _fmix32(((seed & _MASK) + _fmix32(((seed >> 32) + _fmix32(stream)) & _MASK)) & _MASK)
    b = _fmix32((a + 0x9E3779B9) & _MASK)
    x = np.arange(count, dtype=np.uint32)
    x += np.uint32(a)
    x = fmix32(x)
    x ^= np.uint32(b)
    return fmix32(x)


def uniform(seed: int, stream: int, count: int) -> npt.NDArray[np.float32]:
    """The top 24 bits of the hash as float32 in [0, 1), [count]."""
    return (counter_hash(seed, stream, count) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _fmix32(x: int) -> int:
    return int(fmix32(np.array([x], np.uint32))[0])

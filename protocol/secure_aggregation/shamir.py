"""t-of-n secret sharing over a prime field, vectorized.

Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979. A 32-byte secret is cut into 9 limbs of
30 bits; each is the constant term of its own random polynomial of degree t - 1 over GF(2^31 - 1). The field is
larger than a limb, so any t - 1 shares are uniform and independent of the secret, whatever it is.

Written here because what is on the package index either shares text or small integers one at a time in pure
Python (a round of 1,000 clients reconstructs 1,000 secrets of 32 bytes from 60 shares each), or needs a compiler
on the device. A Mersenne prime below 2^32 lets numpy do all limbs and all holders at once in 64-bit integers, and
is easy in any language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.errors import SecureAggregationError

PRIME = 2**31 - 1
SECRET_BYTES = 32
LIMBS = 9
LIMB_BITS = 30
SHARE_BYTES = 4 * LIMBS

Elements = npt.NDArray[np.uint64]
Random = Callable[[int], bytes]
"""So many random bytes; `os.urandom` but in tests."""

_PRIME = np.uint64(PRIME)
_SHIFT = np.uint64(31)


def split(secret: bytes, points: Sequence[int], threshold: int, random: Random) -> list[bytes]:
    """One share of `SHARE_BYTES` for each point; any `threshold` of them give the secret back.

    Args:
        secret: `SECRET_BYTES`.
        points: distinct, from 1 to PRIME - 1: who holds the share.
        threshold: 1 to len(points).
        random: a cryptographically strong source.
    """
    assert len(secret) == SECRET_BYTES, "secrets have one size"
    assert 1 <= threshold <= len(points), "the threshold can be reached"
    assert len(set(points)) == len(points), "points are distinct"
    assert min(points) >= 1, "0 is where the secret is"
    number = int.from_bytes(secret, "little")
    limbs = np.array([number >> (LIMB_BITS * i) & (2**LIMB_BITS - 1) for i in range(LIMBS)], np.uint64)
    coefficients = random_elements((threshold - 1) * LIMBS, random).reshape(threshold - 1, LIMBS)
    x = np.array(points, np.uint64)[:, None]
    shares = np.zeros((len(points), LIMBS), np.uint64)
    for coefficient in coefficients:
        shares = _reduce((shares + coefficient) * x)
    return [row.tobytes() for row in _reduce(shares + limbs).astype("<u4")]


def combine(points: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret from as many shares as its threshold.

    Args:
        points: of the shares; distinct, from 1 to PRIME - 1.
        shares: `SHARE_BYTES` each.

    Raises:
        SecureAggregationError: a share is not one, or together they are of no secret of `SECRET_BYTES`.
    """
    weights = weights_at_zero(points)
    if any(len(share) != SHARE_BYTES for share in shares):
        raise SecureAggregationError(f"a share of another length than {SHARE_BYTES} bytes")
    values = np.frombuffer(b"".join(shares), "<u4").astype(np.uint64).reshape(len(points), LIMBS)
    if (values >= _PRIME).any():
        raise SecureAggregationError("a share outside of its field")
    limbs = _reduce(_reduce(values * weights[:, None]).sum(axis=0, dtype=np.uint64))
    number = sum(int(limb) << (LIMB_BITS * i) for i, limb in enumerate(limbs))
    if (limbs >> np.uint64(LIMB_BITS)).any() or number >> (8 * SECRET_BYTES):
        raise SecureAggregationError("shares that belong to no secret: at least one of them is wrong")
    return number.to_bytes(SECRET_BYTES, "little")


def weights_at_zero(points: Sequence[int]) -> Elements:
    """Lagrange's weights: the value at 0 is the sum of the values at `points` times these, uint64 [points]."""
    x = np.array(points, np.uint64)
    size = len(x)
    differences = (x[None, :] + _PRIME - x[:, None]) % _PRIME
    others = np.broadcast_to(x, (size, size)).copy()
    diagonal = np.arange(size)
    differences[diagonal, diagonal] = others[diagonal, diagonal] = 1
    assert (differences != 0).all(), "points are distinct"
    return _reduce(_product(others) * _inverse(_product(differences)))


def random_elements(count: int, random: Random) -> Elements:
    """Uniform field elements, uint64 [count]: 31 random bits each, and again where they are the prime itself."""
    found = np.zeros(0, np.uint64)
    while len(found) < count:
        drawn = np.frombuffer(random(4 * (count - len(found))), "<u4") & np.uint32(PRIME)
        found = np.concatenate([found, drawn[drawn != PRIME].astype(np.uint64)])
    return found


def _reduce(x: Elements) -> Elements:
    """Modulo 2^31 - 1, for any x below 2^64."""
    x = (x & _PRIME) + (x >> _SHIFT)
    x = (x & _PRIME) + (x >> _SHIFT)
    return np.where(x >= _PRIME, x - _PRIME, x)


def _product(rows: Elements) -> Elements:
    """The product of every row."""
    while rows.shape[1] > 1:
        if rows.shape[1] % 2:
            rows = np.concatenate([rows, np.ones((len(rows), 1), np.uint64)], axis=1)
        rows = _reduce(rows[:, ::2] * rows[:, 1::2])
    return rows[:, 0]


def _inverse(x: Elements) -> Elements:
    """x^(p - 2), Fermat."""
    result = np.ones_like(x)
    for bit in f"{PRIME - 2:b}":
        result = _reduce(result * result)
        if bit == "1":
            result = _reduce(result * x)
    return result

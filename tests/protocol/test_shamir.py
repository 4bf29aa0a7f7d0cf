"""Secret sharing: any t shares give the secret, t - 1 say nothing."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation.shamir import (
    LIMB_BITS,
    LIMBS,
    PRIME,
    SHARE_BYTES,
    combine,
    random_elements,
    split,
    weights_at_zero,
)


def reference_combine(points, shares):
    """Lagrange at 0 in Python's integers, by the textbook."""
    limbs = []
    for limb in range(LIMBS):
        total = 0
        for x, share in zip(points, shares, strict=True):
            y = int.from_bytes(share[4 * limb : 4 * limb + 4], "little")
            for other in points:
                if other != x:
                    y = y * other % PRIME * pow(other - x, -1, PRIME) % PRIME
            total = (total + y) % PRIME
        limbs.append(total)
    return sum(limb << (LIMB_BITS * i) for i, limb in enumerate(limbs)).to_bytes(32, "little")


@given(data=st.data(), secret=st.binary(min_size=32, max_size=32), holders=st.integers(1, 40))
def test_any_t_shares_give_the_secret(data, secret, holders):
    points = data.draw(st.lists(st.integers(1, PRIME - 1), min_size=holders, max_size=holders, unique=True))
    threshold = data.draw(st.integers(1, holders))
    shares = split(secret, points, threshold, random.Random(data.draw(st.integers())).randbytes)
    assert all(len(share) == SHARE_BYTES for share in shares)
    chosen = data.draw(st.permutations(range(holders)))[:threshold]
    taken = [points[i] for i in chosen], [shares[i] for i in chosen]
    assert combine(*taken) == secret == reference_combine(*taken)
    # More than the threshold are as good.
    assert combine(points, shares) == secret


def test_every_subset_of_five_holders():
    secret = bytes(range(32))
    for threshold in range(1, 6):
        shares = split(secret, [1, 2, 3, 4, 5], threshold, os.urandom)
        for size in range(1, 6):
            for chosen in itertools.combinations(range(5), size):
                points, some = [i + 1 for i in chosen], [shares[i] for i in chosen]
                if size >= threshold:
                    assert combine(points, some) == secret
                else:
                    # A chance of 2^-270 to be right by accident.
                    with pytest.raises(SecureAggregationError):
                        assert combine(points, some) != secret
                        raise SecureAggregationError("it gave another secret")


def test_t_minus_1_shares_fit_every_secret():
    """Whatever the secret, some polynomial goes through the shares that are known: they say nothing about it."""
    points, threshold = [1, 2, 3, 4, 5], 4
    shares = split(os.urandom(32), points, threshold, os.urandom)[: threshold - 1]
    for wanted in (0, 1, 2**30 - 1, 12345678):
        # The share at 4 that would make the first limb `wanted`, from Lagrange's weights.
        weights = [int(weight) for weight in weights_at_zero(points[:threshold])]
        known = sum(
            weight * int.from_bytes(share[:4], "little") for weight, share in zip(weights, shares, strict=False)
        )
        missing = (wanted - known) * pow(weights[-1], -1, PRIME) % PRIME
        total = (known + weights[-1] * missing) % PRIME
        assert total == wanted


def test_shares_of_one_secret_are_uniform():
    """Chi-square over 64 bins of 9 * 4,000 limbs: 63 degrees of freedom, standard deviation 11.2."""
    drawn = [split(bytes(32), [7, 8], 2, random.Random(seed).randbytes)[0] for seed in range(4000)]
    values = np.frombuffer(b"".join(drawn), "<u4")
    counts = np.bincount((values.astype(np.float64) / PRIME * 64).astype(int), minlength=64)
    expected = len(values) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.2


def test_the_prime_itself_is_drawn_again():
    stream = iter([b"\xff\xff\xff\x7f\x01\x00\x00\x00", b"\xff\xff\xff\xff", b"\x02\x00\x00\x80"])
    assert random_elements(2, lambda _count: next(stream)).tolist() == [1, 2]


@pytest.mark.parametrize("damage", [b"", b"\0" * 35, b"\xff" * 36])
def test_what_is_no_share(damage):
    shares = split(bytes(32), [1, 2, 3], 2, os.urandom)
    with pytest.raises(SecureAggregationError, match="share"):
        combine([1, 2], [shares[0], damage])


def test_a_wrong_share_does_not_pass_for_a_right_one():
    secret = os.urandom(32)
    shares = split(secret, [1, 2, 3], 2, os.urandom)
    wrong = bytes([shares[1][0] ^ 1]) + shares[1][1:]
    try:
        assert combine([1, 2], [shares[0], wrong]) != secret
    except SecureAggregationError as error:
        assert "no secret" in str(error)

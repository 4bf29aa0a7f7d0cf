"""The parameters that a round sums: the same for everybody."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation.support import choose_positions, support_of
from support.secure_session import settings_of


def settings_with(count, positions=b"", seed=1):
    digest = hashlib.sha256(positions).digest() if positions else b""
    return settings_of(count, seed=seed, positions=digest, positions_bytes=len(positions))


@given(size=st.integers(1, 300), share=st.floats(0.01, 1), seed=st.integers(0, 2**53 - 1))
def test_random_ones(size, share, seed):
    count = max(1, round(share * size))
    support = support_of(settings_with(count, seed=seed), size)
    assert len(support) == count
    assert (np.diff(support) > 0).all()
    assert 0 <= support[0] <= support[-1] < size


@given(size=st.integers(4, 300), seed=st.integers(0, 2**53 - 1))
def test_the_largest_of_the_last_sum_and_random_others(size, seed):
    last = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    count, chosen = size // 2, size // 4
    positions = choose_positions(last, chosen)
    support = support_of(settings_with(count, positions, seed), size, positions)
    assert len(support) == count
    assert (np.diff(support) > 0).all()
    largest = np.argsort(-np.abs(last), kind="stable")[:chosen]
    assert set(largest.tolist()) <= set(support.tolist())


def test_every_parameter_has_its_turn():
    last = np.zeros(100, np.float32)
    last[:10] = 1
    positions = choose_positions(last, 10)
    seen = set()
    for seed in range(60):
        seen |= set(support_of(settings_with(20, positions, seed), 100, positions).tolist())
    assert seen == set(range(100))


def test_positions_that_are_none():
    positions = choose_positions(np.arange(100, dtype=np.float32), 30)
    with pytest.raises(SecureAggregationError, match="number of positions"):
        support_of(settings_with(20, positions), 100, positions)
    for bad in (positions[:-1], positions + b"\0", b"\xff" * 20):
        with pytest.raises(SecureAggregationError, match="do not decode"):
            support_of(settings_with(40, bad), 100, bad)
    with pytest.raises(SecureAggregationError, match="the model has 10"):
        support_of(settings_with(40), 10)

"""Exact sums, against Python's integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.folding import FRACTION_BITS, FixedPointSum
from edgetrain.coordinator.strategies import Contribution, fedavg
from edgetrain.protocol import SparseOrDense

SIZE = 5
# Eight of the largest still fit: 8 * 100 * 10^6 * 2^30 < 2^63.
values = st.floats(-100, 100, width=32)
weights = st.integers(1, 1_000_000)
dense = st.lists(values, min_size=SIZE, max_size=SIZE).map(
    lambda numbers: SparseOrDense(SIZE, None, np.array(numbers, np.float32))
)
sparse = st.dictionaries(st.integers(0, SIZE - 1), values, max_size=SIZE).map(
    lambda entries: SparseOrDense(
        SIZE, np.array(sorted(entries), np.int64), np.array([entries[i] for i in sorted(entries)], np.float32)
    )
)
updates = st.lists(st.tuples(dense | sparse, weights), min_size=1, max_size=8)


def add_all(pairs):
    total = FixedPointSum(SIZE)
    for update, weight in pairs:
        total.add(update, weight)
    return total


def fixed(update, weight):
    """Each element of weight * update as the nearest multiple of 2^-30, ties to even, in Python's integers."""
    numbers = [float(value) for value in update.dense()]
    return [round(Fraction(number) * weight * 2**FRACTION_BITS) for number in numbers]


@pytest.mark.parametrize("magnitude", [1.0, 2.0**19, 2.0**20 * 1.99, 2.0**21, 2.0**24, 2.0**32])
def test_values_on_and_around_halves_are_rounded_to_even(magnitude):
    """At 2^21, a value times 2^30 has no room for a fraction in a float64 any more."""
    near = np.float32(magnitude) + np.spacing(np.float32(magnitude)) * np.arange(-4, 5, dtype=np.float32)
    halves = np.float32(2.0**-31) * np.array([1, 3, 5, -1, -3, 7, 2, -7, 0], np.float32)
    for numbers in (near, -near, halves, halves * np.float32(1.5)):
        update = SparseOrDense(9, None, numbers.astype(np.float32))
        total = FixedPointSum(9)
        total.add(update, 1)
        assert total.total.tolist() == fixed(update, 1)


@given(updates)
def test_the_sum_is_that_of_python_integers(pairs):
    expected = [sum(column) for column in zip(*(fixed(update, weight) for update, weight in pairs), strict=True)]
    total = add_all(pairs)
    assert total.total.tolist() == expected
    assert total.weight == sum(weight for _, weight in pairs)
    assert total.count == len(pairs)


@given(updates, st.randoms())
def test_the_order_does_not_matter(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert add_all(shuffled).total.tobytes() == add_all(pairs).total.tobytes()
    assert add_all(shuffled).mean().tobytes() == add_all(pairs).mean().tobytes()


@given(updates, st.integers(0, 8))
def test_partial_sums_add_up_to_the_whole(pairs, at):
    one, two = add_all(pairs[:at]), add_all(pairs[at:])
    assert (one.total + two.total).tobytes() == add_all(pairs).total.tobytes()


@given(updates)
def test_the_mean_is_the_weighted_mean_to_float32s_precision(pairs):
    weight = sum(weight for _, weight in pairs)
    for index, mean in enumerate(add_all(pairs).mean()):
        exact = sum(Fraction(float(update.dense()[index])) * w for update, w in pairs) / weight
        # Half a unit per contribution, and float64's own rounding.
        assert abs(Fraction(float(mean)) - exact) <= Fraction(len(pairs), 2**31 * weight) + abs(exact) / 2**50


@given(st.lists(st.tuples(st.floats(-(2.0**100), 2.0**100, width=32), weights), max_size=12))
def test_it_never_overflows(pairs):
    """It is refused, with nothing added, or it is exact."""
    total, accepted = FixedPointSum(1), []
    for number, weight in pairs:
        update = SparseOrDense(1, None, np.array([number], np.float32))
        before = (total.total.tolist(), total.weight, total.count)
        try:
            total.add(update, weight)
        except UpdateRefused:
            assert (total.total.tolist(), total.weight, total.count) == before
        else:
            accepted += fixed(update, weight)
    assert total.total.tolist() == [sum(accepted)]


@pytest.mark.parametrize("number", [np.float32(3.4e38), np.float32(2.0**33)])
def test_values_that_could_overflow_are_refused(number):
    with pytest.raises(UpdateRefused, match="too large"):
        FixedPointSum(1).add(SparseOrDense(1, None, np.array([number], np.float32)), 1)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(number):
    with pytest.raises(UpdateRefused):
        FixedPointSum(1).add(SparseOrDense(1, None, np.array([number], np.float32)), 1)


def test_another_length_is_refused():
    with pytest.raises(UpdateRefused, match="has 2 parameters, the model has 1"):
        FixedPointSum(1).add(SparseOrDense(2, None, np.zeros(2, np.float32)), 1)


def test_nothing_added_is_no_change():
    assert FixedPointSum(3).mean().tolist() == [0, 0, 0]


# --- FedAvg ------------------------------------------------------------------------------------------


def test_fedavg_by_hand():
    """3 examples moved by (1, 0, -1), 1 example by (0, 4, 0): the mean is (0.75, 1, -0.75)."""
    strategy = fedavg()
    partial = strategy.init(3, {})
    for client, examples, update in (
        ("a", 3, SparseOrDense(3, None, np.array([1, 0, -1], np.float32))),
        ("b", 1, SparseOrDense(3, np.array([1]), np.array([4], np.float32))),
    ):
        partial = strategy.fold(partial, Contribution(client, examples, 1, update))
    parameters = np.array([10, 20, 30], np.float32)
    after, state = strategy.finish(partial, parameters, {})
    assert after.dtype == np.float32
    assert after.tolist() == [10.75, 21, 29.25]
    assert parameters.tolist() == [10, 20, 30]
    assert state == {}


@given(updates)
def test_fedavg_agrees_with_numpy(pairs):
    strategy = fedavg()
    partial = strategy.init(SIZE, {})
    for update, weight in pairs:
        partial = strategy.fold(partial, Contribution("c", weight, 1, update))
    start = np.linspace(-1, 1, SIZE, dtype=np.float32)
    after, _ = strategy.finish(partial, start, {})
    mean = np.average([u.dense().astype(np.float64) for u, _ in pairs], axis=0, weights=[float(w) for _, w in pairs])
    np.testing.assert_allclose(after, start + mean, rtol=2e-6, atol=1e-7)

"""Ranges against plain sets of positions."""

from __future__ import annotations

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.ranges import RangeSet

pairs = st.tuples(st.integers(0, 40), st.integers(0, 40))


def positions(ranges):
    return {i for start, stop in ranges for i in range(start, stop)}


def check(ranges, expected):
    listed = list(ranges)
    assert positions(listed) == expected
    assert ranges.size == len(expected)
    assert all(start < stop for start, stop in listed)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(listed)), "no two touch"


@given(st.lists(st.tuples(st.booleans(), pairs), max_size=30))
def test_adding_and_removing_is_set_arithmetic(steps):
    ranges, expected = RangeSet(), set()
    for adding, (start, stop) in steps:
        if adding:
            ranges.add(start, stop)
            expected |= set(range(start, stop))
        else:
            ranges.remove(start, stop)
            expected -= set(range(start, stop))
        check(ranges, expected)
    assert positions(ranges.gaps(30)) == set(range(30)) - expected


@given(st.lists(pairs), st.lists(pairs), st.integers(0, 50))
def test_differences_and_first_positions(ours, theirs, most):
    a, b = RangeSet(ours), RangeSet(theirs)
    check(a.without(b), positions(ours) - positions(theirs))
    check(a.first(most), set(sorted(positions(ours))[:most]))
    check(a, positions(ours))


def test_a_hostile_order_costs_no_quadratic_time():
    """Every second byte of 100,000, from both ends: 50,000 ranges."""
    started = time.process_time()
    ranges = RangeSet()
    for i in range(0, 50_000, 2):
        ranges.add(i, i + 1)
        ranges.add(99_999 - i, 100_000 - i)
    assert len(ranges) == 50_000
    assert time.process_time() - started < 10

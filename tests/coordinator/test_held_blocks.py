"""Dense int8 updates that are summed together: to the bit what Python's integers say, one after the other."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.folding import FRACTION_BITS, FixedPointSum
from edgetrain.coordinator.rounds.held_blocks import HeldBlocks, is_worth_holding
from edgetrain.protocol import SparseOrDense
from edgetrain.protocol.codecs import Limits, decode, encode
from edgetrain.protocol.codecs.blocks import BlockCodes

ONE = 0x3F80
# Two whole blocks and a short one.
LENGTH, SIZE = 75, 32


def bfloat16(bits):
    return float(np.uint32(bits << 16).view(np.float32))


def update(codes, scales, size=SIZE):
    codes, scales = np.asarray(codes, np.int8), np.asarray(scales, np.uint16)
    blocks = BlockCodes(codes, scales, size, 127, max(map(bfloat16, scales.tolist())))
    return SparseOrDense(len(codes), None, blocks)


def fixed(added, weight):
    """Each element of weight * update as the nearest multiple of 2^-30, ties to even, in Python's integers."""
    blocks = added.blocks
    numbers = [
        Fraction(bfloat16(int(blocks.scales[place // blocks.size]))) * code * weight * 2**FRACTION_BITS
        for place, code in enumerate(blocks.codes.tolist())
    ]
    return [round(number) for number in numbers]


def sums(pairs):
    return [sum(column) for column in zip(*(fixed(added, weight) for added, weight in pairs), strict=True)]


# From 2^-127 to 4: units that are integers and units that are not, and zero.
scales = st.lists(st.integers(0, 0x4080), min_size=3, max_size=3)
codes = st.lists(st.integers(-127, 127), min_size=LENGTH, max_size=LENGTH)
pairs = st.lists(st.tuples(st.builds(update, codes, scales), st.integers(1, 100_000)), min_size=1, max_size=6)


@given(pairs, st.integers(0, 6))
def test_the_sum_is_that_of_python_integers_whenever_it_is_looked_at(pairs, at):
    total = FixedPointSum(LENGTH)
    for number, (added, weight) in enumerate(pairs):
        assert is_worth_holding(added.blocks, weight)
        if number == at:
            assert total.total.tolist() == (sums(pairs[:at]) if at else [0] * LENGTH)
        total.add(added, weight)
    assert total.total.tolist() == sums(pairs)
    assert (total.weight, total.count) == (sum(weight for _, weight in pairs), len(pairs))


def test_the_largest_digits_of_the_most_updates_are_exact():
    """Units of 2^24 - 1 have two digits of twelve ones; 32 * 127 times that is what a float32 must hold."""
    pairs = [(update([127, -127] * 16, [ONE - (30 << 7)]), weight) for weight in [2**24 - 1] * 64 + [2**31 - 1] * 9]
    total = FixedPointSum(32)
    for added, weight in pairs:
        total.add(added, weight)
    assert total.total.tolist() == sums(pairs)


def test_many_more_than_are_held_at_a_time_and_others_between():
    generator = np.random.default_rng(3)
    total, alone = FixedPointSum(LENGTH), FixedPointSum(LENGTH)
    for number in range(150):
        size = 32 if number % 40 < 30 else 64
        scales = generator.integers(0x3000, 0x3F80, -(-LENGTH // size))
        added = update(generator.integers(-127, 128, LENGTH), scales, size)
        total.add(added, number + 1)
        # The same as floats: folded at once.
        alone.add(SparseOrDense(LENGTH, None, added.values), number + 1)
    assert total.total.tobytes() == alone.total.tobytes()
    assert (total.weight, total.count) == (alone.weight, alone.count)


def test_sums_that_hold_some_are_merged():
    pairs = [(update([number] * LENGTH, [ONE, ONE + 1, 0x2F81]), number + 1) for number in range(7)]
    one, two = FixedPointSum(LENGTH), FixedPointSum(LENGTH)
    for number, (added, weight) in enumerate(pairs):
        (one if number < 3 else two).add(added, weight)
    one.merge(two)
    assert one.total.tolist() == sums(pairs)


def test_one_that_could_overflow_is_refused_alone():
    small, large = update([5] * LENGTH, [ONE] * 3), update([127] * LENGTH, [0x7000] * 3)
    total = FixedPointSum(LENGTH)
    total.add(small, 2)
    with pytest.raises(UpdateRefused, match="too large"):
        total.add(large, 1)
    with pytest.raises(UpdateRefused, match="has 75 parameters, the model has 74"):
        FixedPointSum(74).add(small, 1)
    total.add(small, 1)
    assert total.total.tolist() == sums([(small, 3)])
    assert (total.weight, total.count) == (3, 2)


def test_large_scales_of_small_codes_are_not_refused():
    """What the codes could be would not fit, what they are does."""
    added = update([1] + [0] * (LENGTH - 1), [0x4F00] * 3)
    total = FixedPointSum(LENGTH)
    total.add(added, 1)
    total.add(added, 1)
    assert total.total.tolist() == sums([(added, 2)])


def test_what_was_held_may_change_afterwards():
    codes = np.ones(LENGTH, np.int8)
    held = HeldBlocks(update(codes, [ONE] * 3).blocks)
    held.hold(BlockCodes(codes, np.full(3, ONE, np.uint16), SIZE, 127, 1.0), 2.0**FRACTION_BITS)
    codes[:] = 0
    total = np.zeros(LENGTH, np.int64)
    held.add_to(total)
    held.add_to(total)
    assert total.tolist() == [2**FRACTION_BITS] * LENGTH


@pytest.mark.parametrize("codec", ["dense|int8:block=256", "dense|int8:block=100|packed", "dense|int4:block=64"])
def test_updates_of_a_codec_come_as_blocks_with_the_values_of_their_floats(codec):
    delta = np.random.default_rng(0).normal(0, 1e-3, 1000).astype(np.float32)
    decoded = decode(encode(delta, codec), Limits(max_parameters=1000))
    assert is_worth_holding(decoded.blocks, 10)
    blocks = decoded.blocks
    expected = [code * bfloat16(int(blocks.scales[at // blocks.size])) for at, code in enumerate(blocks.codes.tolist())]
    assert decoded.values.tolist() == expected
    assert np.abs(decoded.values - delta).max() <= blocks.top

"""What is summed: exact modulo 2^b, for every number of clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation.arithmetic import (
    LARGEST,
    OCTAVES,
    Layout,
    Quantizer,
    count_octaves,
    dequantize,
    finest,
    make_layout,
    next_range,
    pack,
    quantize,
    unpack,
)
from edgetrain.protocol.secure_aggregation.masks import Masker, word_type


@given(
    clients=st.integers(1, 100_000),
    kind=st.sampled_from(["int8", "int4"]),
    noise=st.one_of(st.just(0), st.integers(0, 2**40)),
)
def test_the_modulus_is_the_smallest_that_holds_every_sum(clients, kind, noise):
    """The proof in the docstring, with Python's integers."""
    layout = make_layout(Quantizer(kind=kind, range=1.0, noise_bound=noise), count=10, clients=clients)
    extreme = clients * (LARGEST[kind] + noise)
    assert -(2 ** (layout.bits - 1)) <= -extreme <= extreme < 2 ** (layout.bits - 1)
    assert 2 * extreme + 1 > 2 ** (layout.bits - 1), "one bit fewer would not do"
    assert clients * (2**layout.digit_bits - 1) < 2**layout.bits
    assert clients * (2 ** (layout.digit_bits + 1) - 1) >= 2**layout.bits


@given(clients=st.integers(1, 100_000), kind=st.sampled_from(["int8", "int4"]), bits=st.integers(2, 30))
def test_the_finest_integers_that_fit_into_so_many_bits(clients, kind, bits):
    largest = finest(kind, clients=clients, bits=bits)
    assert 2 * clients * largest + 1 <= 2**bits
    assert largest == LARGEST[kind] or 2 * clients * (largest + 1) + 1 > 2**bits
    if largest:
        quantizer = Quantizer(kind=kind, range=1.0, largest=largest)
        assert make_layout(quantizer, count=10, clients=clients).bits <= bits
        assert quantizer.step == 1.0 / largest


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("kind", "clients", "noise"), [("int8", 3, 0), ("int4", 1000, 0), ("int8", 257, 10**9)])
def test_the_largest_sum_there_can_be(sign, kind, clients, noise):
    quantizer = Quantizer(kind=kind, range=0.5, noise_bound=noise, max_weight=0)
    layout = make_layout(quantizer, count=4, clients=clients)
    one = quantize(
        np.full(4, sign * 9.9, np.float32), 1, quantizer, layout, seed=1,
        noise=(lambda count: np.full(count, sign * noise, np.int64)) if noise else None,
    )  # fmt: skip
    assert one.integers.tolist() == [sign * (LARGEST[kind] + noise)] * 4
    words = Masker(layout.length, layout.bits).zeros()
    for _ in range(clients):
        words += one.integers.astype(words.dtype)
    total = dequantize(words, clients, quantizer, layout)
    assert total.integers.tolist() == [sign * clients * (LARGEST[kind] + noise)] * 4


@given(data=st.data(), bits=st.integers(1, 64), length=st.integers(1, 50))
def test_packing_is_exact_and_without_gaps(data, bits, length):
    layout = Layout(length, bits, 1, 0, 0)
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length))
    packed = pack(np.array(numbers, np.uint64), layout)
    assert len(packed) == -(-length * bits // 8)
    # Bit by bit with Python's integers.
    assert int.from_bytes(packed, "little") == sum(number << (bits * i) for i, number in enumerate(numbers))
    assert unpack(packed, layout).tolist() == numbers


def test_what_is_no_vector():
    layout = Layout(3, 10, 1, 0, 0)
    good = pack(np.array([1, 2, 3]), layout)
    for bad in (good[:-1], good + b"\0", b""):
        with pytest.raises(SecureAggregationError, match="expected were 4"):
            unpack(bad, layout)
    with pytest.raises(SecureAggregationError, match="behind its end"):
        unpack(good[:-1] + b"\x40", layout)


@given(seed=st.integers(0, 2**32), clients=st.integers(1, 30), kind=st.sampled_from(["int8", "int4"]))
def test_the_sum_is_the_plain_sum_of_what_was_quantized(seed, clients, kind):
    generator = np.random.default_rng(seed)
    quantizer = Quantizer(kind=kind, range=0.1, max_weight=500, octaves=True)
    layout = make_layout(quantizer, count=20, clients=clients)
    words = Masker(layout.length, layout.bits).zeros()
    weights, integers, counted = 0, np.zeros(20, np.int64), np.zeros(len(OCTAVES), np.int64)
    weighted = np.zeros(20)
    for client in range(clients):
        values = generator.normal(0, 0.08, 20).astype(np.float32)
        weight = int(generator.integers(1, 900))
        quantized = quantize(values, weight, quantizer, layout, seed=client)
        words += unpack(pack(quantized.integers, layout), layout)
        effective = min(weight, 500)
        weights += effective
        integers += quantized.integers[:20]
        counted += count_octaves(values.astype(np.float64) * effective / 500 / 0.1)
        weighted += effective * quantized.decoded.astype(np.float64)
    total = dequantize(words, clients, quantizer, layout)
    assert total.weight == weights
    np.testing.assert_array_equal(total.integers, integers)
    assert list(total.octaves) == counted.tolist()
    # What each client believes of its part is what the mean holds, to float32.
    np.testing.assert_allclose(total.mean, weighted / weights, rtol=1e-5, atol=1e-7)


def test_rounding_has_no_bias_and_no_value_beyond_the_range():
    quantizer = Quantizer(kind="int4", range=0.7)
    layout = make_layout(quantizer, count=100_000, clients=10)
    values = np.full(100_000, 0.123, np.float32)
    quantized = quantize(values, 1, quantizer, layout, seed=5)
    # One step is 0.1: standard deviation below 0.05 / sqrt(100,000) = 0.00016.
    assert abs(quantized.decoded.mean() - 0.123) < 0.0007
    assert set(np.unique(quantized.integers)) == {1, 2}
    clipped = quantize(np.array([9, -9], np.float32), 1, quantizer, make_layout(quantizer, count=2, clients=2), seed=1)
    assert clipped.integers.tolist() == [7, -7]
    np.testing.assert_allclose(clipped.decoded, [0.7, -0.7], rtol=1e-6)


def test_octaves_and_the_next_range():
    relative = np.array([0, 2**-20, 2**-7, 0.5, 0.51, 1.0, -1.5, 300.0])
    counts = dict(zip(OCTAVES, count_octaves(relative), strict=True))
    assert counts == dict.fromkeys(OCTAVES, 0) | {-7: 2, -1: 1, 0: 2, 1: 1, 8: 1}
    octaves = tuple(counts[octave] for octave in OCTAVES)
    assert next_range(0.1, octaves, clipped=0.0) == 0.1 * 2**8
    assert next_range(0.1, octaves, clipped=1 / 7) == 0.1 * 2
    assert next_range(0.1, octaves, clipped=2 / 7) == 0.1
    assert next_range(0.1, (8,) + (0,) * 15, clipped=0.0) == 0.1 / 2**7
    assert next_range(0.1, (0,) * 16, clipped=0.0) == 0.1, "nothing but zeros says nothing"
    assert next_range(0.1, (), clipped=0.0) == 0.1


@pytest.mark.parametrize(
    ("quantizer", "noise", "what"),
    [
        (Quantizer(range=1.0, noise_bound=3), np.array([4, 0], np.int64), "magnitude 3"),
        (Quantizer(range=1.0, noise_bound=3), np.array([1.0, 0.0]), "64-bit"),
        (Quantizer(range=1.0, noise_bound=3), np.array([1], np.int64), "2 64-bit"),
    ],
)
def test_noise_is_held_to_the_bound_that_the_modulus_was_chosen_for(quantizer, noise, what):
    layout = make_layout(quantizer, count=2, clients=3)
    with pytest.raises(SecureAggregationError, match=what):
        quantize(np.zeros(2, np.float32), 1, quantizer, layout, seed=0, noise=lambda _count: noise)


def test_noise_is_in_the_sum_and_not_in_what_the_client_believes_to_have_sent():
    quantizer = Quantizer(range=1.27, noise_bound=50)
    layout = make_layout(quantizer, count=2, clients=3)
    quantized = quantize(
        np.array([0.5, 0], np.float32), 1, quantizer, layout, seed=0, noise=lambda _count: np.array([-50, 7])
    )
    assert quantized.integers.tolist() == [0, 7]
    np.testing.assert_allclose(quantized.decoded, [0.5, 0.0], rtol=1e-6)


def test_sums_that_no_honest_clients_make():
    quantizer = Quantizer(range=1.0, max_weight=10, octaves=True)
    layout = make_layout(quantizer, count=5, clients=3)
    nothing = np.zeros(layout.length, word_type(layout.bits))
    with pytest.raises(SecureAggregationError, match="weights that sum up to 0"):
        dequantize(nothing, 3, quantizer, layout)
    nothing[5] = 4
    nothing[layout.count + layout.weight_digits] = 16
    with pytest.raises(SecureAggregationError, match="do not add up"):
        dequantize(nothing, 3, quantizer, layout)


def test_too_many_bits_and_bad_ranges():
    with pytest.raises(SecureAggregationError, match="64 is the most"):
        make_layout(Quantizer(range=1.0, noise_bound=2**62), count=1, clients=10)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SecureAggregationError, match="range"):
            make_layout(Quantizer(range=bad), count=1, clients=10)
    with pytest.raises(SecureAggregationError, match="finite"):
        layout = make_layout(Quantizer(range=1.0), count=1, clients=2)
        quantize(np.array([np.nan], np.float32), 1, Quantizer(range=1.0), layout, seed=0)


def test_masks_are_chacha20_of_rfc_8439():
    """The first words of the keystream for the zero key and nonce: appendix A.1, test vector 1."""
    masker = Masker(4, 32)
    vector = masker.zeros()
    masker.add(vector, bytes(32))
    assert vector.astype("<u4").tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    masker.subtract(vector, bytes(32))
    assert not vector.any()
    assert [word_type(bits).itemsize for bits in (1, 16, 17, 32, 33, 64)] == [2, 2, 4, 4, 8, 8]

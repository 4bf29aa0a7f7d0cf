"""Noise has exactly the distribution that it says, whichever way a comparison is decided."""

from __future__ import annotations

import functools
import math
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from edgetrain.protocol.privacy import Keystream, PrivacyError, discrete_gaussian, noise, rounded_gaussian, skellam
from edgetrain.protocol.privacy.clipping import clip, clip_to_grid
from edgetrain.protocol.privacy.randomness import bernoulli, sample, words

KEY = b"a key of thirty-two bytes, known"


def pmf(kind, deviation, k):
    """By independent means: scipy's distributions, or the definition summed up."""
    if kind is rounded_gaussian:
        return stats.norm.cdf((k + 0.5) / deviation) - stats.norm.cdf((k - 0.5) / deviation)
    if kind is skellam:
        return stats.skellam.pmf(k, deviation**2 / 2, deviation**2 / 2)
    wide = np.arange(-2000, 2001)
    return np.exp(-(k**2) / (2 * deviation**2)) / np.exp(-(wide**2) / (2 * deviation**2)).sum()


CASES = [
    (rounded_gaussian, 0.3), (rounded_gaussian, 1.0), (rounded_gaussian, 7.3), (rounded_gaussian, 100.0),
    (discrete_gaussian, 0.4), (discrete_gaussian, 1.0), (discrete_gaussian, 13.7), (discrete_gaussian, 100.0),
    (skellam, 0.5), (skellam, 3.0), (skellam, 60.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "deviation"), CASES)
def test_every_value_comes_as_often_as_it_should(kind, deviation):
    count = 200_000
    drawn = kind(deviation)(Keystream(KEY), count)
    assert drawn.dtype == np.int64
    k = np.arange(drawn.min() - 3, drawn.max() + 4)
    expected = pmf(kind, deviation, k) * count
    observed = np.bincount(drawn - k[0], minlength=len(k))
    enough = expected >= 10
    rest_expected, rest_observed = count - expected[enough].sum(), count - observed[enough].sum()
    statistic = ((observed - expected)[enough] ** 2 / expected[enough]).sum()
    statistic += (rest_observed - rest_expected) ** 2 / max(rest_expected, 10)
    assert stats.chi2.sf(statistic, enough.sum()) > 1e-4


@pytest.mark.parametrize("kind", [rounded_gaussian, discrete_gaussian])
@pytest.mark.parametrize("deviation", [2.0**20, 1.37 * 2.0**30, 2.0**36, 2.0**44])
def test_on_a_fine_grid_it_is_gaussian(kind, deviation):
    drawn = kind(deviation)(Keystream(KEY), 200_000) / deviation
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    # Every last bit is as random as the first.
    last = kind(deviation)(Keystream(KEY), 100_000) & 15
    assert stats.chisquare(np.bincount(last, minlength=16)).pvalue > 1e-4


@pytest.mark.parametrize("kind", [rounded_gaussian, discrete_gaussian])
@pytest.mark.parametrize("deviation", [0.7, 3.0, 500.0, 2.0**30])
def test_exact_arithmetic_decides_as_float64_does_where_that_is_clear(kind, deviation, monkeypatch):
    """With margins of a half, nearly every comparison goes by float64, or the exact way: the same noise from the same
    bytes."""
    fast = kind(deviation)(Keystream(KEY), 300)
    monkeypatch.setattr(noise, "_CLEAR", 0.5)
    np.testing.assert_array_equal(kind(deviation)(Keystream(KEY), 300), fast)
    monkeypatch.setattr(noise, "_CLEAR_64", 0.5)
    np.testing.assert_array_equal(kind(deviation)(Keystream(KEY), 300), fast)


@pytest.mark.parametrize("kind", [rounded_gaussian, discrete_gaussian])
@pytest.mark.parametrize("deviation", [0.7, 40.0, 1.99 * 2.0**30, 2.0**31])
def test_float32_is_never_wrong_by_more_than_its_margin(kind, deviation, monkeypatch):
    """Half a million probabilities against float64: an eighth of the margin would do."""
    stairs = noise._staircase(deviation, discrete=kind is discrete_gaussian)
    seen = []
    monkeypatch.setattr(
        noise, "_fraction", lambda bits, plain=noise._fraction: seen.append((bits, plain(bits))) or seen[-1][1]
    )
    picked = []
    monkeypatch.setattr(noise, "_pick", lambda *a, plain=noise._pick: picked.append(plain(*a)) or picked[-1])
    probabilities = []
    monkeypatch.setattr(np, "exp", lambda x, plain=np.exp: probabilities.append(plain(x)) or probabilities[-1])
    stairs._try(Keystream(KEY), 500_000)
    monkeypatch.undo()
    (places, _), (coins, as_singles) = seen
    along = places.astype(np.float64) * 2.0**-32
    scale = (2.0**stairs.log_width / deviation) ** 2 / 2
    exact = np.exp(-scale * along * (2.0 * picked[0] + along)) - coins.astype(np.float64) * 2.0**-32
    assert np.abs(exact - (probabilities[0].astype(np.float64) - as_singles)).max() < noise._CLEAR / 8


def test_a_comparison_that_64_bits_leave_open_takes_more():
    """The stair's probability at the place 0 is 1: only a coin of all ones needs a further look."""
    stairs = noise._staircase(100.0, discrete=False)
    most = 2**64 - 1
    decide = functools.partial(stairs._decide, bits=64)
    # Just right of the stair's left end, the probability is below 1 by less than the coin can tell.
    decided = [decide(3, 0, most, random_bytes=Keystream(bytes([number]) * 32)) for number in range(200)]
    # P(accept) is about a half: place uniform in a last cell over which the probability falls by 3 coins' widths.
    scale = (2.0**stairs.log_width / 100.0) ** 2 / 2
    slope = scale * 2 * 3
    expected = 200 * np.mean(np.random.default_rng(0).random(10**6) > slope * np.random.default_rng(1).random(10**6))
    assert abs(sum(decided) - expected) < 5 * math.sqrt(200 * 0.25)
    assert len(set(decided)) == 2


def test_ties_in_a_table_are_broken_by_further_bits():
    table = noise._Table.of([5 << 64, (7 << 64) + 2**62, (7 << 64) + 3 * 2**62])
    # After the leading 14 bits, which are 0, 50 more of each word.
    stream = b"".join((value << 14).to_bytes(8, "little") for value in [7, 4, 7, 7])
    stream += b"".join(value.to_bytes(8, "little") for value in [2**61, 2**63, 2**64 - 1])
    position = 0

    def scripted(count: int) -> bytes:
        nonlocal position
        position += count
        return stream[position - count : position]

    # 7 | 2^61 is below both thresholds of 7, 7 | 2^63 between them, 7 | 2^64 - 1 above.
    assert noise._pick(table, np.zeros(4, np.uint16), scripted).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(("kind", "deviation"), CASES)
def test_the_largest_noise_is_known(kind, deviation):
    bound = noise.largest(kind, deviation)
    assert np.abs(kind(deviation)(Keystream(KEY), 100_000)).max() <= bound
    # As far as the tail goes; for skellam, from one end of a Poisson table to the other.
    assert 13.5 * deviation <= bound <= (20 * deviation + 230 if kind is skellam else 14.6 * deviation + 3)


def test_the_same_bytes_give_the_same_noise_and_no_other_do():
    draw = rounded_gaussian(2.0**30)
    np.testing.assert_array_equal(draw(Keystream(KEY), 1000), draw(Keystream(KEY), 1000))
    assert (draw(Keystream(), 1000) != draw(Keystream(), 1000)).mean() > 0.99
    assert (draw(os.urandom, 1000) != draw(os.urandom, 1000)).mean() > 0.99
    assert draw(Keystream(KEY), 0).shape == (0,)


def test_the_keystream_is_chacha20():
    expected = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(100))
    stream = Keystream(KEY)
    assert stream(40) + stream(60) == expected
    assert words(Keystream(KEY), 2).tolist() == [int.from_bytes(expected[:8], "little"),
                                                 int.from_bytes(expected[8:16], "little")]  # fmt: skip


def test_coins_and_samples():
    coins = bernoulli(Keystream(KEY), 0.03, 200_000)
    assert stats.binomtest(int(coins.sum()), 200_000, 0.03).pvalue > 1e-4
    assert bernoulli(Keystream(KEY), 1.0, 5).all()
    stream = Keystream(KEY)
    counts = np.zeros(10)
    for _ in range(2000):
        chosen = sample(stream, 10, 3)
        assert len(set(chosen.tolist())) == 3
        counts[chosen] += 1
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf, 2.0**46])
def test_impossible_deviations_are_refused(deviation):
    with pytest.raises(PrivacyError, match="deviation"):
        rounded_gaussian(deviation)


@pytest.mark.parametrize("size", [1, 66, 10_000])
@pytest.mark.parametrize("steps", [3.0, 1000.0, 2.0**30])
def test_clipping_to_a_grid_holds_after_rounding_too(size, steps):
    """Rounding alone would lengthen a vector of halves by a lot: exact integers say that it did not."""
    for vector in (
        np.random.default_rng(size).normal(0, 1, size).astype(np.float32),
        np.full(size, 0.5 * 1.001 / steps),
        np.full(size, 1e30, np.float32),
    ):
        integers, norm = clip_to_grid(vector, 1.0, 1 / steps)
        assert sum(int(value) ** 2 for value in integers) <= steps**2
        assert norm == pytest.approx(float(np.linalg.norm(vector.astype(np.float64))))
    short = np.zeros(size)
    short[0] = 0.7
    assert clip_to_grid(short, 1.0, 1 / steps)[0][0] == round(0.7 * steps)


def test_clipping_leaves_short_vectors_alone():
    vector = np.array([3.0, 4.0], np.float32)
    np.testing.assert_array_equal(clip(vector, 5.0)[0], vector)
    np.testing.assert_allclose(clip(vector, 2.5)[0], [1.5, 2.0])

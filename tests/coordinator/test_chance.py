"""Tails of draws against scipy's."""

from __future__ import annotations

import pytest
from scipy import stats

from edgetrain.coordinator.privacy.chance import NEGLIGIBLE, chance_of_fewer, most_drawn
from edgetrain.protocol.privacy import Release


def drawn(sampling, rate):
    return Release(noise_multiplier=1.0, sampling=sampling, sampling_rate=rate)


@pytest.mark.parametrize(("population", "present", "rate", "least"), [
    (10_000, 10_000, 0.01, 37), (10_000, 6_000, 0.01, 30), (15, 15, 14 / 15, 3), (100, 80, 0.5, 30), (8, 2, 0.5, 3),
])  # fmt: skip
def test_how_likely_few_are(population, present, rate, least):
    binomial = stats.binom.cdf(least - 1, present, rate)
    assert chance_of_fewer(drawn("poisson", rate), population, present, least) == pytest.approx(binomial, rel=1e-6)
    hypergeometric = stats.hypergeom.cdf(least - 1, population, present, round(rate * population))
    fixed = chance_of_fewer(drawn("fixed", rate), population, present, least)
    assert fixed == pytest.approx(hypergeometric, rel=1e-6, abs=1e-15)


def test_everybody_or_a_fixed_number():
    assert chance_of_fewer(drawn("poisson", 1.0), 5, 5, 5) == 0
    assert chance_of_fewer(drawn("poisson", 1.0), 5, 4, 5) == 1
    assert chance_of_fewer(drawn("fixed", 0.5), 10, 10, 5) == 0
    assert chance_of_fewer(drawn("fixed", 0.5), 10, 10, 6) == 1


def test_how_many_are_drawn_at_most():
    most = most_drawn(drawn("poisson", 0.01), 10_000)
    assert stats.binom.sf(most, 10_000, 0.01) <= NEGLIGIBLE < stats.binom.sf(most - 1, 10_000, 0.01)
    assert most_drawn(drawn("poisson", 1.0), 7) == 7
    assert most_drawn(drawn("fixed", 0.2), 50) == 10

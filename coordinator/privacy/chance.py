"""How likely a draw is to yield few clients, or many."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from edgetrain.protocol.combinatorics import log_binomial
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.secure_aggregation.graph import SECURITY_BITS

# What happens less often than this does not count: as for the graph of secure aggregation.
NEGLIGIBLE = 2.0**-SECURITY_BITS


def chance_of_fewer(release: Release, population: int, present: int, least: int) -> float:
    """The probability that fewer than `least` are drawn.

    Poisson: binomial, of those who are present. Fixed: hypergeometric, since places of the absent stay empty.

    Args:
        release: how the draw is made.
        population: places.
        present: how many of them belong to somebody who is here.
        least: a number of clients.
    """
    log_chance = _log_chance(release, population, present)
    return min(1.0, math.fsum(math.exp(log_chance(number)) for number in range(min(least, present + 1))))


@functools.lru_cache(maxsize=16)
def most_drawn(release: Release, population: int) -> int:
    """The smallest number that a draw from the whole population exceeds with a negligible probability only."""
    log_chance = _log_chance(release, population, population)
    beyond, number = 0.0, population
    while number > 0 and (beyond := beyond + math.exp(log_chance(number))) <= NEGLIGIBLE:
        number -= 1
    return number


def _log_chance(release: Release, population: int, present: int) -> Callable[[int], float]:
    rate, size = release.sampling_rate, round(release.sampling_rate * population)
    if release.sampling == "fixed":
        return lambda number: (
            log_binomial(present, number)
            + log_binomial(population - present, size - number)
            - log_binomial(population, size)
        )
    if rate >= 1:
        return lambda number: 0.0 if number == present else -math.inf
    return lambda number: (
        log_binomial(present, number) + number * math.log(rate) + (present - number) * math.log1p(-rate)
    )

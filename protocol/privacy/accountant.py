"""From releases to (epsilon, delta)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.protocol.privacy import subsampling
from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.mechanisms import renyi
from edgetrain.protocol.privacy.release import Release

Doubles = npt.NDArray[np.float64]

# Those of dp-accounting, so that both look for the best bound in the same places.
ORDERS: tuple[float, ...] = (
    *(1 + tenths / 10 for tenths in range(1, 100)),
    *map(float, range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)


Accountant = Callable[[Sequence[Release], float], float]
"""`accountant(releases, delta)` -> epsilon."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What releases have cost together."""

    epsilon: float
    # The Renyi order with the best bound.
    order: float


def spent(releases: Iterable[Release], delta: float) -> Spent:
    """The (epsilon, delta) of all releases together, whatever each was chosen by what came before.

    Renyi divergences add up under adaptive composition (Mironov 2017, proposition 1).

    Args:
        releases: in any order.
        delta: above 0 and below 1.

    Raises:
        PrivacyError: releases with different neighbours in one sum, or a delta that means nothing.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta:g}: choose one above 0 and well below 1 / number of participants")
    listed = list(releases)
    if len(relations := {release.relation for release in listed}) > 1:
        raise PrivacyError(
            f"releases with neighbours by {' and by '.join(sorted(relations))} cannot be added up: keep one kind of "
            "sampling ('fixed', or 'poisson' and 'none')"
        )
    total = np.zeros(len(ORDERS))
    for release in listed:
        total += release.steps * divergences(msgspec.structs.replace(release, steps=1))
    return to_epsilon(total, delta)


def rdp_accountant(releases: Sequence[Release], delta: float) -> float:
    """Epsilon by Renyi divergences."""
    return spent(releases, delta).epsilon if releases else 0.0


@lru_cache(maxsize=4096)
def divergences(release: Release) -> Doubles:
    """Of one such sum, at `ORDERS`, amplified by its sampling."""
    values = np.array([_divergence(release, order) for order in ORDERS])
    values.flags.writeable = False
    return values


def to_epsilon(divergence: Doubles, delta: float) -> Spent:
    """The best epsilon of Renyi divergences at `ORDERS`.

    Canonne, Kamath and Steinke 2020, proposition 12: epsilon = D + log(1 - 1/alpha) - log(delta alpha)/(alpha - 1).
    Where delta >= sqrt(1 - e^-D), epsilon is 0 (Bretagnolle and Huber 1979).
    """
    best = Spent(math.inf, ORDERS[0])
    for order, value in zip(ORDERS, divergence, strict=True):
        if delta**2 + math.expm1(-value) > 0:
            epsilon = 0.0
        else:
            epsilon = value + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        if epsilon < best.epsilon:
            best = Spent(max(0.0, float(epsilon)), order)
    return best


def _divergence(release: Release, order: float) -> float:
    rate = release.sampling_rate
    # What holds for the sampled Gaussian alone needs its very densities; others take the general theorems.
    if release.sampling == "poisson":
        if release.mechanism == "gaussian":
            return subsampling.poisson_gaussian(release.noise_multiplier, rate, order)
        return subsampling.poisson(lambda alpha: renyi(release, alpha), rate, order)
    if release.sampling == "fixed":
        if release.mechanism == "gaussian":
            return subsampling.fixed_gaussian(release.noise_multiplier, rate, order)
        return subsampling.fixed(lambda alpha: renyi(release, alpha), rate, order)
    return renyi(release, order)

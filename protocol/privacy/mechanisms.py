"""Renyi divergences of the mechanisms themselves, before any amplification by sampling.

Every function returns D_alpha(M(x) || M(x')) in the worst case over neighbours, in nats, at one order alpha > 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.release import Release


def renyi(release: Release, order: float) -> float:
    """The divergence of one sum, as if everybody took part.

    Raises:
        PrivacyError: the release lacks what its mechanism needs.
    """
    if release.mechanism == "gaussian" or (release.mechanism == "discrete-gaussian" and release.shares == 1):
        return gaussian(release.noise_multiplier, order)
    if not release.l2_sensitivity or not release.dimension:
        raise PrivacyError(
            f"{release.mechanism} noise on a grid: l2_sensitivity (in steps of the grid) and dimension are needed"
        )
    deviation = release.noise_multiplier * release.l2_sensitivity
    if release.mechanism == "skellam":
        return skellam(deviation**2, release.l2_sensitivity, release.dimension, order)
    return summed_discrete_gaussian(deviation, release.l2_sensitivity, release.dimension, release.shares, order)


def gaussian(noise_multiplier: float, order: float) -> float:
    """Gaussian noise of standard deviation `noise_multiplier` times the sensitivity (Mironov 2017, corollary 3).

    The discrete Gaussian, on integers with an integer-valued function, has the same bound: Canonne, Kamath and
    Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, theorem 4 and proposition 5.
    """
    return order / (2 * noise_multiplier**2)


def summed_discrete_gaussian(deviation: float, l2: float, dimension: int, shares: int, order: float) -> float:
    """A sum of `shares` discrete Gaussians, which is close to one but not one.

    Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation", ICML 2021, proposition 14: with shares of variance s^2 = deviation^2 / shares >= 1/4 and
    tau = 10 sum_{k=1}^{shares - 1} exp(-2 pi^2 s^2 k / (k + 1)),

        D_alpha <= min(alpha l2^2 / (2 deviation^2) + tau d,  alpha / 2 (l2 / deviation + tau sqrt(d))^2).

    Args:
        deviation: of the sum, in steps of the grid.
        l2: sensitivity, in steps of the grid.
        dimension: d.
        shares: number of summands.
        order: alpha.

    Raises:
        PrivacyError: shares finer than half a step, where the bound does not hold.
    """
    share = deviation / math.sqrt(shares)
    if share < 0.5:
        raise PrivacyError(
            f"discrete Gaussian shares of deviation {share:.3g} steps are too fine: at least 0.5 is needed. Use a "
            "finer grid (a larger scale), or skellam noise"
        )
    k = np.arange(1, shares)
    tau = 10 * float(np.exp(-2 * math.pi**2 * share**2 * k / (k + 1)).sum())
    direct = order * l2**2 / (2 * deviation**2) + tau * dimension
    return min(direct, order / 2 * (l2 / deviation + tau * math.sqrt(dimension)) ** 2)


def skellam(variance: float, l2: float, dimension: int, order: float) -> float:
    """Skellam noise: the difference of two Poisson variables, closed under sums.

    Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated Learning", NeurIPS 2021,
    theorem 3.5, for integer alpha > 1 and variance mu:

        D_alpha <= alpha l2^2 / (2 mu) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 mu^2), 3 l1 / (2 mu)),

    where for integer vectors l1 <= min(sqrt(d) l2, l2^2). Between integers, (alpha - 1) D_alpha is convex in alpha
    (van Erven and Harremoes 2014) and so below the chord.
    """
    l1 = min(math.sqrt(dimension) * l2, l2**2)

    def at(alpha: int) -> float:
        excess = min(((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
        return alpha * l2**2 / (2 * variance) + excess

    return interpolated(lambda alpha: 0.0 if alpha == 1 else (alpha - 1) * at(alpha), order)


def interpolated(log_moment: Callable[[int], float], order: float) -> float:
    """D at any order > 1, from (alpha - 1) D_alpha at integers (0 at 1), which is convex."""
    low, high = math.floor(order), math.ceil(order)
    part = order - low
    value = log_moment(low) if low == high else (1 - part) * log_moment(low) + part * log_moment(high)
    return value / (order - 1)

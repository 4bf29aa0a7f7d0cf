"""Amplification by sampling: Renyi divergences of a mechanism that sees only a secret random part of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.privacy.mechanisms import gaussian, interpolated

Doubles = npt.NDArray[np.float64]

# Beyond this order the bound for fixed-size samples is taken in its simple form, which is as good there.
_MOMENTS_UP_TO = 256
# Of the trapezoidal rule, in deviations of the noise: errors are below e^(-2 pi^2 s / step), s the noise multiplier.
_STEP = 0.04


def poisson_gaussian(noise_multiplier: float, rate: float, order: float) -> float:
    """Gaussian noise on a Poisson sample, both neighbours' directions.

    Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", arXiv:1908.10530:
    section 3.3 at integer orders (a finite sum), else by numerical integration.
    """
    if rate >= 1:
        return gaussian(noise_multiplier, order)
    moment = _integer_moment if float(order).is_integer() else _fractional_moment
    return max(0.0, moment(noise_multiplier, rate, order)) / (order - 1)


def poisson(divergence: Callable[[float], float], rate: float, order: float) -> float:
    """Any mechanism on a Poisson sample.

    Zhu and Wang, "Poisson Subsampled Renyi Differential Privacy", ICML 2019, theorem 6, at integer orders:

        (alpha - 1) D <= log((1-q)^(alpha-1) (alpha q - q + 1) + C(alpha,2) q^2 (1-q)^(alpha-2) e^D(2)
                             + 3 sum_{j=3}^alpha C(alpha,j) (1-q)^(alpha-j) q^j e^((j-1) D(j)))

    Args:
        divergence: of the mechanism, by order.
        rate: q.
        order: alpha.
    """
    if rate >= 1:
        return divergence(order)

    def log_moment(alpha: int) -> float:
        if alpha == 1:
            return 0.0
        j = np.arange(2, alpha + 1)
        logs = _log_binomials(alpha)[2:] + (alpha - j) * math.log1p(-rate) + j * math.log(rate)
        logs += np.array([(k - 1) * divergence(float(k)) for k in j]) + np.where(j == 2, 0.0, math.log(3))
        first = (alpha - 1) * math.log1p(-rate) + math.log(alpha * rate - rate + 1)
        return max(0.0, _log_sum([first, *logs]))

    return interpolated(log_moment, order)


def fixed_gaussian(noise_multiplier: float, rate: float, order: float) -> float:
    """Gaussian noise on a uniform sample of fixed size, without replacement; neighbours by replacement.

    Wang, Balle and Kasiviswanathan, "Subsampled Renyi Differential Privacy and Analytical Moments Accountant",
    AISTATS 2019, theorem 27. With B(l) = E[(p/q - 1)^l] of the mechanism without sampling:

        (alpha - 1) D <= log(1 + rate^2 C(alpha,2) min(4 (e^D(2) - 1), 2 e^D(2))
            + sum_{j=3}^alpha rate^j C(alpha,j) min(4 sqrt(B(2 floor(j/2)) B(2 ceil(j/2))), 2 e^((j-1) D(j))))
    """
    return _fixed(lambda alpha: gaussian(noise_multiplier, alpha), rate, order, noise_multiplier)


def fixed(divergence: Callable[[float], float], rate: float, order: float) -> float:
    """Any mechanism on a sample of fixed size: as `fixed_gaussian`, without the terms with B (theorem 9 there)."""
    return _fixed(divergence, rate, order, None)


def _fixed(divergence: Callable[[float], float], rate: float, order: float, noise_multiplier: float | None) -> float:
    if rate >= 1:
        return divergence(order)

    def log_moment(alpha: int) -> float:
        if alpha == 1:
            return 0.0
        j = np.arange(2, alpha + 1)
        terms = math.log(2) + np.array([(k - 1) * divergence(float(k)) for k in j])
        second = divergence(2.0)
        terms[0] = min(math.log(4) + second + math.log(-math.expm1(-second)), terms[0])
        if noise_multiplier is not None and alpha <= _MOMENTS_UP_TO:
            moments = _log_even_moments(noise_multiplier)
            terms[1:] = np.minimum(terms[1:], math.log(4) + (moments[j[1:] // 2] + moments[(j[1:] + 1) // 2]) / 2)
        return _log_sum([0.0, *(terms + j * math.log(rate) + _log_binomials(alpha)[2:])])

    return interpolated(log_moment, order)


def _integer_moment(noise_multiplier: float, rate: float, order: float) -> float:
    alpha = int(order)
    k = np.arange(alpha + 1)
    logs = _log_binomials(alpha) + (alpha - k) * math.log1p(-rate) + k * math.log(rate)
    return _log_sum(logs + (k * k - k) / (2 * noise_multiplier**2))


def _fractional_moment(noise_multiplier: float, rate: float, order: float) -> float:
    """log E[(1 - q + q p(x) / p0(x))^alpha] for x from p0 = N(0, s^2), p = N(1, s^2): the definition, integrated.

    The integrand is analytic in a strip around the real line, so the trapezoidal rule converges exponentially; the
    paper's alternating series takes thousands of terms where the noise is small.
    """
    u, step = _grid(order / noise_multiplier + 14)
    t = u / noise_multiplier - 1 / (2 * noise_multiplier**2)
    # log(1 - q + q e^t), also where e^t overflows.
    ratio = np.where(t > 30, np.logaddexp(t + math.log(rate), math.log1p(-rate)), 0.0)
    ratio = np.where(t > 30, ratio, np.log1p(rate * np.expm1(np.minimum(t, 30.0))))
    return _log_sum(order * ratio - u**2 / 2) + math.log(step / math.sqrt(2 * math.pi))


def _grid(reach: float) -> tuple[Doubles, float]:
    """Places from -reach to reach, fine enough for a normal density, and the step between them."""
    half = math.ceil(reach / _STEP)
    return np.arange(-half, half + 1, dtype=np.float64) * _STEP, _STEP


@lru_cache(maxsize=64)
def _log_even_moments(noise_multiplier: float) -> Doubles:
    """log E[(p/q - 1)^(2l)] for l = 0 … 128, p = N(1, s^2) and q = N(0, s^2).

    The integrand is positive and analytic, so the trapezoidal rule converges exponentially, and nothing cancels as
    it does in the paper's forward differences.
    """
    length = _MOMENTS_UP_TO // 2 + 1
    result = np.zeros(length)
    for low in range(0, length, 16):
        l = np.arange(low, min(low + 16, length))
        reach = 2 * l[-1] / noise_multiplier + math.sqrt(2 * l[-1]) + 14
        u, step = _grid(reach)
        t = u / noise_multiplier - 1 / (2 * noise_multiplier**2)
        with np.errstate(divide="ignore", over="ignore"):
            # log |e^t - 1|, also where e^t overflows.
            ratio = np.where(t > 30, t, np.log(np.abs(np.expm1(np.minimum(t, 30.0)))))
        with np.errstate(invalid="ignore"):
            logs = np.nan_to_num(2 * l[:, None] * ratio, nan=0.0, neginf=-np.inf) - u**2 / 2
        top = logs.max(axis=1, keepdims=True)
        result[l] = top[:, 0] + np.log(np.exp(logs - top).sum(axis=1) * step / math.sqrt(2 * math.pi))
    return result


@lru_cache(maxsize=1024)
def _log_binomials(alpha: int) -> Doubles:
    """log C(alpha, k) for k = 0 … alpha."""
    logs = np.array([math.lgamma(k + 1) for k in range(alpha + 1)])
    result: Doubles = logs[-1] - logs - logs[::-1]
    return result


def _log_sum(logs: npt.ArrayLike) -> float:
    values = np.asarray(logs, np.float64)
    top = float(values.max())
    return top if math.isinf(top) else top + math.log(float(np.exp(values - top).sum()))

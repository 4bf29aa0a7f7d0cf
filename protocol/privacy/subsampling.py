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
# A series has converged when its terms are below e to this power.
_NEGLIGIBLE = -40.0


def poisson_gaussian(noise_multiplier: float, rate: float, order: float) -> float:
    """Gaussian noise on a Poisson sample, both neighbours' directions.

    Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", arXiv:1908.10530:
    section 3.3 at integer orders (a finite sum), else the two series of section 3.3 with complementary error
    functions.
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
        logs += np.array([(k - 1) * divergence(k) for k in j]) + np.where(j == 2, 0.0, math.log(3))
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
        terms = math.log(2) + np.array([(k - 1) * divergence(k) for k in j])
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
    """log of the sum of the two series; their terms change sign once i > alpha, and become small soon after."""
    s2 = noise_multiplier**2
    z0 = s2 * math.log(1 / rate - 1) + 0.5
    log_q, log_p = math.log(rate), math.log1p(-rate)
    logs: list[float] = []
    signs: list[float] = []
    for i in range(10_000):
        sign, binomial = _binomial(order, i)
        j = order - i
        width = math.sqrt(2) * noise_multiplier
        left = i * log_q + j * log_p + (i * i - i) / (2 * s2) + _log_half_erfc((i - z0) / width)
        right = j * log_q + i * log_p + (j * j - j) / (2 * s2) + _log_half_erfc((z0 - j) / width)
        logs += [binomial + left, binomial + right]
        signs += [sign, sign]
        if i > order and max(logs[-2:]) < _NEGLIGIBLE + max(logs):
            break
    top = max(logs)
    return top + math.log(float(np.dot(signs, np.exp(np.array(logs) - top))))


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
        u, step = np.linspace(-reach, reach, max(2, math.ceil(2 * reach / 0.04)), retstep=True)
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


@lru_cache(maxsize=1 << 16)
def _binomial(alpha: float, k: int) -> tuple[float, float]:
    """Sign and log |C(alpha, k)| for alpha that is no integer."""
    # Of the factors alpha - i, i < k, those beyond alpha are negative.
    negative = max(0, k - math.floor(alpha) - 1)
    log = math.lgamma(alpha + 1) - math.lgamma(k + 1) - math.lgamma(alpha - k + 1)
    return (-1.0 if negative % 2 else 1.0), log


def _log_half_erfc(x: float) -> float:
    """log(erfc(x) / 2), also where erfc underflows (asymptotic series, Abramowitz and Stegun 7.1.23)."""
    if x < 25:
        return math.log(math.erfc(x) / 2)
    y = 1 / (2 * x * x)
    return -x * x - math.log(2 * x * math.sqrt(math.pi)) + math.log1p(-y + 3 * y**2 - 15 * y**3)


def _log_sum(logs: npt.ArrayLike) -> float:
    values = np.asarray(logs, np.float64)
    top = float(values.max())
    return top if math.isinf(top) else top + math.log(float(np.exp(values - top).sum()))

"""How much noise a budget needs, and what a budget buys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from edgetrain.protocol.privacy.accountant import Accountant, rdp_accountant
from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.release import Release

# Relative precision of the noise multiplier; what is returned is always enough.
PRECISION = 1e-5
MOST_NOISE = 1e6


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    releases: Callable[[float], Sequence[Release]],
    accountant: Accountant = rdp_accountant,
) -> float:
    """The smallest noise multiplier with which all releases cost at most (epsilon, delta).

    Args:
        epsilon: above 0.
        delta: above 0 and below 1.
        releases: all that is planned, by the noise multiplier.
        accountant: works out the cost.

    Raises:
        PrivacyError: there is none.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise PrivacyError(f"epsilon is {epsilon:g}: choose one above 0, e.g. 4")

    def enough(noise: float) -> bool:
        return accountant(releases(noise), delta) <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2
        if high > MOST_NOISE:
            raise PrivacyError(f"no noise multiplier up to {MOST_NOISE:g} gives epsilon {epsilon:g} at delta {delta:g}")
    low = high / 2
    while enough(low):
        high, low = low, low / 2
        if high < 1e-2:
            return high
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """A plan for a budget: what `edgetrain privacy plan --format json` prints."""

    level: str
    accountant: str
    sampling: str
    sampling_rate: float
    # Standard deviation of the noise in each sum, in L2 sensitivities of it …
    noise_multiplier: float
    # … and in clip norms: twice that where one participant may be replaced by another.
    noise_per_clip_norm: float
    # Of the noise in the mean, per element, in clip norms.
    mean_noise_per_clip_norm: float
    # Asked for, and what the noise multiplier comes to.
    target_epsilon: float
    epsilon: float
    delta: float
    rounds: int
    # Noisy sums in all.
    releases: int
    # Per round: participants, or the samples of an optimizer step.
    expected_participants: int
    population: int
    # Epsilon after the first round, and after each tenth of them: [round, epsilon].
    course: tuple[tuple[int, float], ...]


def forecast(
    *,
    level: str,
    release: Release,
    target_epsilon: float,
    delta: float,
    rounds: int,
    releases_per_round: int,
    participants: int,
    population: int,
    accountant: Accountant = rdp_accountant,
    accountant_name: str = "rdp",
) -> Forecast:
    """Solves for the noise and predicts what it costs.

    Args:
        level: "client" or "sample", for people.
        release: one release; its noise multiplier is what is solved for.
        target_epsilon: the budget.
        delta: of the budget.
        rounds: of the federation.
        releases_per_round: noisy sums in each.
        participants: expected in each sum.
        population: of clients, or of samples.
        accountant: works out the cost.
        accountant_name: its name.

    Raises:
        PrivacyError: no noise is enough.
    """

    def after(number: int, noise: float) -> Release:
        return msgspec.structs.replace(release, noise_multiplier=noise, steps=number * releases_per_round)

    noise = noise_multiplier_for(target_epsilon, delta, lambda noise: [after(rounds, noise)], accountant)
    stops = sorted({1, *(math.ceil(rounds * tenth / 10) for tenth in range(1, 11))})
    course = tuple((number, accountant([after(number, noise)], delta)) for number in stops)
    per_clip_norm = noise * release.sensitivity_per_clip_norm
    return Forecast(
        level=level,
        accountant=accountant_name,
        sampling=release.sampling,
        sampling_rate=release.sampling_rate,
        noise_multiplier=noise,
        noise_per_clip_norm=per_clip_norm,
        mean_noise_per_clip_norm=per_clip_norm / participants,
        target_epsilon=target_epsilon,
        epsilon=course[-1][1],
        delta=delta,
        rounds=rounds,
        releases=rounds * releases_per_round,
        expected_participants=participants,
        population=population,
        course=course,
    )

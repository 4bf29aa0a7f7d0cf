"""DP-FedAvg: nobody can tell from the parameters whether a client's data was used.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1: every delta is
clipped to a norm C, their sum gets Gaussian noise, and it is divided by the number of clients that was expected, not
by the number that came. The norm can follow a quantile of the deltas' norms: Andrew et al., "Differentially Private
Learning with Adaptive Clipping", NeurIPS 2021, algorithm 1, which spends a little of the noise on counting who was
below the norm.

Deltas become integers, multiples of C 2^-30, whose norm is at most 2^30 after rounding; their sum is exact and the
noise is an integer (`protocol.privacy.noise.rounded_gaussian`), so no floating-point attack applies. What a client
claims about its clipping is not trusted: the coordinator clips again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.strategies.base import Contribution, Private, ServerState, Setting, Strategy
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.privacy.clipping import clip_to_grid
from edgetrain.protocol.privacy.noise import Noise, chunks, rounded_gaussian
from edgetrain.protocol.privacy.randomness import Keystream, RandomBytes
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.vectors import Vector

GRID = 2.0**30
"""Multiples of the grid in a clip norm."""
CLIP_NORM = "dp-fedavg/clip_norm"

# Adaptive norms stay within this factor of where they began.
_FARTHEST = 2.0**20


@dataclass(slots=True)
class PrivateSum:
    """A round's partial result."""

    clip_norm: float
    # In multiples of clip_norm / GRID, int64 [num_parameters].
    total: npt.NDArray[np.int64]
    # How many more were below the clip norm than above it.
    balance: int = 0

    def share(self, parts: int) -> None:
        """Nothing to do: what one client adds to an element is at most 2^30."""

    def merge(self, other: PrivateSum) -> None:
        """Takes in another sum for the same clip norm."""
        self.total += other.total
        self.balance += other.balance


def dp_fedavg(
    *,
    clip_norm: Annotated[float, Meta(gt=0)],
    noise_multiplier: Annotated[float, Meta(gt=0)],
    clients_per_round: Annotated[int, Meta(ge=1)],
    sampling: Literal["none", "poisson", "fixed"] = "none",
    population: Annotated[int, Meta(ge=0)] = 0,
    quantile: Annotated[float, Meta(ge=0, lt=1)] = 0.0,
    norm_learning_rate: Annotated[float, Meta(gt=0)] = 0.2,
    count_noise: Annotated[float, Meta(ge=0)] = 0.0,
) -> Strategy:
    """The noisy mean of clipped deltas; every client counts the same.

    Args:
        clip_norm: largest L2 norm of a delta; with `quantile`, where it begins.
        noise_multiplier: standard deviation of the noise in the sum, in L2 sensitivities, as from `edgetrain privacy
            plan`. The sensitivity is one clip norm, with "fixed" two.
        clients_per_round: what the sum is divided by; must be rounds.goal.
        sampling: what chance does for privacy. poisson: each of the population takes part with probability
            clients_per_round / population. fixed: a random subset of that size. none: nothing is counted on.
        population: clients that could be chosen, for poisson and fixed.
        quantile: of the norms, that the clip norm shall follow (0.5 is usual); 0 keeps it fixed.
        norm_learning_rate: of the clip norm.
        count_noise: standard deviation of the noise in the number of clients below the norm; 0 for
            clients_per_round / 20.

    Raises:
        ConfigError: options that contradict each other.
    """
    return private_mean(
        release=_release(noise_multiplier, clients_per_round, sampling, population),
        clip_norm=clip_norm,
        clients_per_round=clients_per_round,
        population=population,
        quantile=quantile,
        norm_learning_rate=norm_learning_rate,
        count_noise=count_noise or clients_per_round / 20,
        random_bytes=Keystream(),
    )


def private_mean(
    *,
    release: Release,
    clip_norm: float,
    clients_per_round: int,
    population: int,
    quantile: float,
    norm_learning_rate: float,
    count_noise: float,
    random_bytes: RandomBytes,
) -> Strategy:
    """As `dp_fedavg`, with the generator of the noise to choose.

    Raises:
        ConfigError: no noise is left for the deltas.
    """
    sensitivity = release.sensitivity_per_clip_norm
    multiplier = release.noise_multiplier
    if quantile:
        # Section 2.1: both together cost what `noise_multiplier` alone would. Counts are of +1 and -1, which halves
        # their sensitivity.
        if 2 * count_noise <= multiplier:
            raise ConfigError(
                f"strategy 'dp-fedavg': count_noise {count_noise:g} leaves no noise for the deltas: it must be above "
                f"noise_multiplier / 2 = {multiplier / 2:g}"
            )
        multiplier = (multiplier**-2 - (2 * count_noise) ** -2) ** -0.5
    noise = rounded_gaussian(multiplier * sensitivity * GRID)
    of_count: Noise = rounded_gaussian(max(2 * count_noise * sensitivity, 1e-6))

    def current(state: ServerState) -> float:
        return float(state[CLIP_NORM]) if CLIP_NORM in state else clip_norm

    def init(num_parameters: int, state: ServerState) -> PrivateSum:
        return PrivateSum(current(state), np.zeros(num_parameters, np.int64))

    def fold(partial: PrivateSum, contribution: Contribution) -> PrivateSum:
        update = contribution.update
        if update.num_parameters != len(partial.total):
            raise UpdateRefused(
                f"the update has {update.num_parameters} parameters, the model has {len(partial.total)}"
            )
        if not np.isfinite(update.values).all():
            raise UpdateRefused("the update holds numbers that are not finite")
        steps, norm = clip_to_grid(update.values, partial.clip_norm, partial.clip_norm / GRID)
        if update.indices is None:
            partial.total += steps
        else:
            partial.total[update.indices] += steps
        below = norm < partial.clip_norm if contribution.unclipped is None else contribution.unclipped
        partial.balance += 1 if below else -1
        return partial

    def finish(partial: PrivateSum, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        after = np.empty_like(parameters)
        scale = partial.clip_norm / (GRID * clients_per_round)
        for part, drawn in chunks(noise, random_bytes, len(parameters)):
            after[part] = parameters[part] + (partial.total[part] + drawn) * scale
        if not quantile:
            return after, state
        count = partial.balance + int(of_count(random_bytes, 1)[0])
        below = 0.5 + count / (2 * clients_per_round)
        following = partial.clip_norm * math.exp(-norm_learning_rate * (below - quantile))
        following = min(max(following, clip_norm / _FARTHEST), clip_norm * _FARTHEST)
        return after, {**state, CLIP_NORM: np.array(following)}

    def objection(setting: Setting) -> str | None:
        if setting.only_sums:
            return (
                "only sums of updates are seen, so it cannot clip single ones: with secure aggregation, clients clip "
                "and add shares of the noise themselves"
            )
        if setting.goal != clients_per_round:
            return f"clients_per_round is {clients_per_round}, but rounds.goal is {setting.goal}: make them equal"
        return None

    return Strategy(
        "dp-fedavg",
        init,
        fold,
        finish,
        objection=objection,
        private=Private(release, current, population),
    )


def _release(
    noise_multiplier: float, clients_per_round: int, sampling: Literal["none", "poisson", "fixed"], population: int
) -> Release:
    if sampling == "none":
        if population:
            raise ConfigError("strategy 'dp-fedavg': population says nothing without sampling; leave it out")
        return Release(mechanism="gaussian", noise_multiplier=noise_multiplier)
    if population < clients_per_round:
        raise ConfigError(
            f"strategy 'dp-fedavg': sampling = {sampling!r} needs the population, at least clients_per_round = "
            f"{clients_per_round}"
        )
    return Release(
        mechanism="gaussian",
        noise_multiplier=noise_multiplier,
        sampling=sampling,
        sampling_rate=clients_per_round / population,
    )

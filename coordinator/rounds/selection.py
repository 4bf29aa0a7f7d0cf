"""Who is invited. Every way to choose is a pure function of the candidates and a seeded generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgetrain.coordinator.clients.history import ClientHistory
from edgetrain.protocol.messages import DeviceState


class SelectionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[selection]: whom to invite."""

    # random: uniformly. all: everyone, whatever the goal. examples: with a probability that grows with the
    # local examples. round-robin: those that took part least. utility: Oort's trade of what a client has to
    # teach against how long it takes.
    method: Literal["random", "all", "examples", "round-robin", "utility"] = "random"

    # Conditions on the device's own state. One that a device does not know (a Pi has no battery) does not
    # keep it out.
    # Least battery charge in percent, unless it is charging; 0 for any.
    min_battery_percent: Annotated[float, Meta(ge=0, le=100)] = 0.0
    only_charging: bool = False
    # Allowed networks, as devices name them ("wifi", "ethernet", "cellular"); empty for any.
    networks: tuple[str, ...] = ()
    min_free_memory_mb: Annotated[int, Meta(ge=0)] = 0
    # Hottest sensor in degrees Celsius; 0 for any.
    max_temperature_c: Annotated[float, Meta(ge=0)] = 0.0

    # Leave a client out after so many rounds in a row that it spoiled (lost, refused, too late); 0 for never.
    ban_after: Annotated[int, Meta(ge=0)] = 0
    # For so many rounds; 0 for the rest of the run.
    ban_rounds: Annotated[int, Meta(ge=0)] = 10

    # utility: share of the invitations that go to clients that never took part.
    exploration: Annotated[float, Meta(ge=0, le=1)] = 0.2
    # utility: a training that takes longer than this is worth less; 0 for the median of those seen.
    preferred_seconds: Annotated[float, Meta(ge=0)] = 0.0
    # utility: how much less: (preferred / seconds) to this power.
    slowness_exponent: Annotated[float, Meta(ge=0)] = 2.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A client that could be invited now."""

    name: str
    num_examples: int = 1
    state: DeviceState = DeviceState()
    past: ClientHistory = field(default_factory=ClientHistory)


def select(
    config: SelectionConfig,
    candidates: Sequence[Candidate],
    count: int,
    *,
    seed: int,
    round_number: int,
    attempt: int,
) -> list[str]:
    """Names of those to invite, sorted; the same arguments give the same choice.

    Args:
        config: [selection].
        candidates: those that `admitted` let through, in the order of their names.
        count: how many are wanted.
        seed: of the run.
        round_number: to choose for.
        attempt: of that round.
    """
    generator = np.random.default_rng((seed, round_number, attempt))
    if config.method == "all":
        return [candidate.name for candidate in candidates]
    order = _ORDERS[config.method](config, candidates, count, round_number, generator)
    return sorted(candidates[index].name for index in order[:count])


def admitted(
    config: SelectionConfig, candidates: Sequence[Candidate], *, round_number: int, least: int
) -> list[Candidate]:
    """Those whose device is fit, without the banned; bans give way where fewer than `least` would be left."""
    fit = [candidate for candidate in candidates if unfit(config, candidate.state) is None]
    free = [candidate for candidate in fit if not banned(config, candidate.past, round_number)]
    return free if len(free) >= least else fit


def unfit(config: SelectionConfig, state: DeviceState) -> str | None:
    """Why a device should be left alone now, or None."""
    battery, heat = state.battery_percent, state.temperature_c
    if config.only_charging and state.charging is False:
        return "not charging"
    if battery is not None and battery < config.min_battery_percent and not state.charging:
        return f"battery at {battery:.0f} %"
    if config.networks and state.network and state.network not in config.networks:
        return f"on {state.network}"
    if state.free_memory_mb is not None and state.free_memory_mb < config.min_free_memory_mb:
        return f"{state.free_memory_mb} MB of memory free"
    if config.max_temperature_c and heat is not None and heat > config.max_temperature_c:
        return f"{heat:.0f} degrees"
    return None


def banned(config: SelectionConfig, past: ClientHistory, round_number: int) -> bool:
    """Whether a client has failed too often lately."""
    if not config.ban_after or past.failures < config.ban_after:
        return False
    return not config.ban_rounds or round_number <= past.failed_round + config.ban_rounds


# --- orders: the most wanted first -------------------------------------------------------------------

_Order = Callable[[SelectionConfig, Sequence[Candidate], int, int, np.random.Generator], Sequence[int]]


def _random(
    _config: SelectionConfig,
    candidates: Sequence[Candidate],
    _count: int,
    _round: int,
    generator: np.random.Generator,
) -> Sequence[int]:
    return [int(index) for index in generator.permutation(len(candidates))]


def _by_examples(
    _config: SelectionConfig,
    candidates: Sequence[Candidate],
    _count: int,
    _round: int,
    generator: np.random.Generator,
) -> Sequence[int]:
    return _weighted([candidate.num_examples for candidate in candidates], generator)


def _round_robin(
    _config: SelectionConfig,
    candidates: Sequence[Candidate],
    _count: int,
    _round: int,
    generator: np.random.Generator,
) -> Sequence[int]:
    lots = generator.permutation(len(candidates))
    return sorted(
        range(len(candidates)),
        key=lambda index: (
            candidates[index].past.accepted,
            candidates[index].past.last_round,
            lots[index],
        ),
    )


def _by_utility(
    config: SelectionConfig,
    candidates: Sequence[Candidate],
    count: int,
    round_number: int,
    generator: np.random.Generator,
) -> Sequence[int]:
    """Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI 2021.

    The statistical utility of a client is num_examples * sqrt(mean of its squared sample losses); devices
    report the mean loss, which stands for that root. To it goes the confidence term
    sqrt(0.1 * log(round) / last_round), and slow ones are divided down. Exploitation draws in proportion to
    utility among those above 95 % of the count-th best; exploration takes unseen clients at random.
    """
    new = [index for index, candidate in enumerate(candidates) if candidate.past.loss is None]
    seen = [index for index, candidate in enumerate(candidates) if candidate.past.loss is not None]
    explore = min(len(new), max(round(config.exploration * count), count - len(seen)))
    unseen = [int(index) for index in generator.permutation(new)]
    if not seen:
        return unseen
    preferred = config.preferred_seconds or float(np.median([candidates[index].past.seconds for index in seen]))
    utilities = [oort_utility(candidates[index], round_number, preferred, config.slowness_exponent) for index in seen]
    exploit = min(len(seen), count - explore)
    cutoff = 0.95 * sorted(utilities, reverse=True)[max(exploit - 1, 0)]
    pool = [(index, value) for index, value in zip(seen, utilities, strict=True) if value >= cutoff]
    drawn = [pool[position][0] for position in _weighted([value for _, value in pool], generator)]
    return drawn[:exploit] + unseen


def oort_utility(candidate: Candidate, round_number: int, preferred: float, exponent: float) -> float:
    """What inviting a client is worth, by equation 2 of the paper."""
    past = candidate.past
    value = candidate.num_examples * abs(past.loss or 0.0)
    value += math.sqrt(0.1 * math.log(max(round_number, 1)) / max(past.last_round, 1))
    if past.seconds > preferred > 0:
        value *= (preferred / past.seconds) ** exponent
    return value


def _weighted(weights: Sequence[float], generator: np.random.Generator) -> list[int]:
    """A random order without replacement, heavier ones earlier (Efraimidis and Spirakis 2006)."""
    uniform = generator.random(len(weights))
    keys = [math.log(max(u, 1e-300)) / max(float(weight), 1e-12) for u, weight in zip(uniform, weights, strict=True)]
    return sorted(range(len(weights)), key=lambda index: -keys[index])


_ORDERS: dict[str, _Order] = {
    "random": _random,
    "examples": _by_examples,
    "round-robin": _round_robin,
    "utility": _by_utility,
}

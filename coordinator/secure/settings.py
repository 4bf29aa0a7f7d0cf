"""What the plans of a round say of secure aggregation, and which settings make no sense with it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.privacy.chance import NEGLIGIBLE, chance_of_fewer, most_drawn
from edgetrain.coordinator.strategies import Private, ServerState, Strategy, described
from edgetrain.protocol.codecs import CodecSpec
from edgetrain.protocol.codecs.selection import count_of
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.secure_aggregation.arithmetic import LARGEST, Quantizer, Total, finest, next_range
from edgetrain.protocol.secure_aggregation.graph import is_secure
from edgetrain.protocol.secure_aggregation.messages import Settings
from edgetrain.protocol.secure_aggregation.noise import noise_bound, noise_of
from edgetrain.protocol.secure_aggregation.support import choose_positions

# What is remembered from round to round, beside what the strategy remembers.
RANGE, LAST_SUM = "secure-aggregation/range", "secure-aggregation/last-sum"
# With two, each knows the other's update from the sum.
LEAST_CLIENTS = 3


def check_secure_aggregation(config: FederationConfig, strategy: Strategy) -> None:
    """Returns if the settings make sense together.

    Raises:
        ConfigError: they do not; the message says why and what to do.
    """
    if reason := _objection(config, strategy):
        raise ConfigError(f"secure aggregation cannot work here: {reason}")


def _objection(config: FederationConfig, strategy: Strategy) -> str | None:
    codec, secure = CodecSpec.parse(config.codec), config.secure_aggregation
    layers = strategy.layers or (strategy.name,)
    remedy = "set codec to 'randk:0.05|int8:block=all:stochastic|packed', or to one with dense or int4"
    if strategy.asynchronous or "fedbuff" in layers:
        return (
            f"strategy {described(strategy)!r} takes updates one by one, as they come, and masks cancel only in the "
            "sum of a round: use a synchronous one such as 'fedavg'"
        )
    if strategy.needs_all:
        return f"strategy {described(strategy)!r} compares single updates, of which only the sum is seen"
    if strategy.control is not None:
        return f"strategy {described(strategy)!r} has clients send control variates beside their updates"
    if strategy.private is not None:
        return (
            f"strategy {described(strategy)!r} clips single updates here, of which only the sum is seen: let the "
            "clients clip (secure_aggregation.max_norm) and add the noise"
        )
    if codec.select not in ("dense", "randk"):
        return (
            f"with {codec.select} in codec {config.codec!r} every client chooses its own parameters, and masks cancel "
            f"only where all send the same: {remedy}, and secure_aggregation.support for large ones"
        )
    if codec.quantize not in ("int8", "int4") or codec.block != "all" or not codec.stochastic or codec.zstd:
        return (
            f"codec {config.codec!r}: all clients must write integers in the same unit, and what is masked does not "
            f"compress: {remedy}"
        )
    if any(rule.codec for rule in config.devices):
        return "a codec in [[devices]]: masks cancel only if all clients send the same parameters in the same unit"
    if config.rounds.least < LEAST_CLIENTS:
        return (
            f"with {config.rounds.least} updates in a sum each client knows the other's: set rounds.goal and "
            f"rounds.minimum to {LEAST_CLIENTS} or more"
        )
    if config.stop.metric == "train_loss":
        return "stop.metric 'train_loss' is made of what clients say of their single updates; use 'loss'"
    if config.selection.method == "utility":
        return "selection 'utility' ranks clients by the losses of their updates; use 'random'"
    if secure.noise_multiplier and not secure.max_norm:
        return "noise is measured in secure_aggregation.max_norm, to which clients clip: set it"
    if secure.noise_multiplier and (secure.weighting != "equal" or secure.adapt_range):
        return (
            "noise is added to values only: with it set secure_aggregation.weighting to 'equal' and "
            "secure_aggregation.adapt_range to false, which would be summed without"
        )
    if reason := _objection_to_sampling(config):
        return reason
    if secure.noise_multiplier and _fewest_honest(config) < 1:
        return (
            f"as many as {secure.max_colluding:.0%} of {_most_invited(config)} clients may collude and leave out their "
            f"noise, and {config.rounds.least} are enough for a sum: raise rounds.minimum"
        )
    if secure.max_bits and not finest(_kind(config), clients=_most_invited(config), bits=secure.max_bits):
        return (
            f"secure_aggregation.max_bits = {secure.max_bits} are too few for the sum of {_most_invited(config)} "
            "clients: raise it, or set it to 0"
        )
    if secure.neighbours % 2:
        return f"secure_aggregation.neighbours = {secure.neighbours}: half of them stand on either side, so it is even"
    if secure.threshold and not secure.neighbours:
        return "secure_aggregation.threshold is a number of a client's neighbours: set neighbours, too"
    if secure.neighbours and not is_secure(
        max(config.rounds.goal, secure.neighbours + 1),
        secure.neighbours,
        secure.threshold or (secure.neighbours + 1) // 2 + 1,
        colluding=secure.max_colluding,
        lying=secure.server_may_lie,
    ):
        return (
            f"{secure.neighbours} neighbours are too few against {secure.max_colluding:.0%} of the clients "
            "colluding: raise secure_aggregation.neighbours or .threshold, or set both to 0 to have them chosen"
        )
    return None


def _objection_to_sampling(config: FederationConfig) -> str | None:
    secure, rounds = config.secure_aggregation, config.rounds
    if secure.sampling == "none":
        return (
            "secure_aggregation.population says nothing without sampling: leave it out" if secure.population else None
        )
    if not secure.noise_multiplier:
        return "secure_aggregation.sampling is for the privacy budget: set noise_multiplier, too, or leave it out"
    if secure.population < rounds.goal:
        return (
            f"secure_aggregation.sampling = {secure.sampling!r} needs the population, at least rounds.goal = "
            f"{rounds.goal}"
        )
    chance = chance_of_fewer(_sampled(config), secure.population, secure.population, rounds.least)
    if chance > NEGLIGIBLE:
        return (
            f"fewer than {rounds.least} of {secure.population} clients may be drawn (probability {chance:.2g}), and a "
            "sum of fewer is not shown: lower rounds.minimum, raise rounds.goal, or set sampling to 'fixed'"
        )
    return None


def chosen_positions(config: FederationConfig, count: int, state: ServerState) -> bytes:
    """The part of a support that is taken from the last sum, encoded; nothing if there is none, or no choice.

    Args:
        config: of the federation.
        count: size of the support.
        state: from the round before.
    """
    secure = config.secure_aggregation
    if secure.support != "last-sum" or LAST_SUM not in state or count >= len(state[LAST_SUM]):
        return b""
    return choose_positions(state[LAST_SUM].astype(np.float32), count - max(1, round(secure.explore * count)))


def round_settings(
    config: FederationConfig, *, number: int, num_parameters: int, state: ServerState, largest_weight: int
) -> Settings:
    """The settings of a round.

    Args:
        config: of the federation.
        number: of the round.
        num_parameters: length of the flat vector.
        state: from the round before.
        largest_weight: of the clients that could be invited.
    """
    secure, codec = config.secure_aggregation, CodecSpec.parse(config.codec)
    count = num_parameters if codec.select == "dense" else count_of(codec, num_parameters)
    positions = chosen_positions(config, count, state)
    known = state.get(RANGE)
    settings = Settings(
        minimum=config.rounds.least,
        count=count,
        seed=(config.seed + number) % 2**53,
        positions=hashlib.sha256(positions).digest() if positions else b"",
        positions_bytes=len(positions),
        quantizer=Quantizer(
            kind=_kind(config),
            range=float(known[0]) if known is not None and secure.adapt_range else secure.value_range,
            max_weight=max(1, largest_weight) if secure.weighting == "examples" else 0,
            octaves=secure.adapt_range,
            largest=_coarser(config),
        ),
        colluding=secure.max_colluding,
        lying=secure.server_may_lie,
        max_norm=secure.max_norm,
        noise_multiplier=secure.noise_multiplier,
        noise=secure.noise,
        noise_shares=max(1, _fewest_honest(config)),
    )
    noise = noise_of(settings)
    if noise is None:
        return settings
    quantizer = msgspec.structs.replace(settings.quantizer, noise_bound=noise_bound(noise))
    return msgspec.structs.replace(settings, quantizer=quantizer)


def _coarser(config: FederationConfig) -> int:
    """The largest integer of a value where `max_bits` asks for less than the codec has, else 0."""
    secure, kind = config.secure_aggregation, _kind(config)
    if not secure.max_bits or secure.noise_multiplier:
        return 0
    largest = finest(kind, clients=_most_invited(config), bits=secure.max_bits)
    return largest if largest < LARGEST[kind] else 0


def _kind(config: FederationConfig) -> Literal["int8", "int4"]:
    return "int4" if CodecSpec.parse(config.codec).quantize == "int4" else "int8"


def _fewest_honest(config: FederationConfig) -> int:
    """In any sum, if the assumed share of all who may be in the roster collude and survive."""
    return config.rounds.least - math.floor(config.secure_aggregation.max_colluding * _most_invited(config))


def _most_invited(config: FederationConfig) -> int:
    secure = config.secure_aggregation
    if secure.sampling == "none":
        return math.ceil(config.rounds.goal * config.rounds.over_selection)
    return most_drawn(_sampled(config), secure.population)


def _sampled(config: FederationConfig, release: Release | None = None) -> Release:
    """A release of noise in `max_norm`, with what chance does for it."""
    secure = config.secure_aggregation
    release = release or Release(noise_multiplier=1.0)
    if secure.sampling == "none":
        return release
    sampled = msgspec.structs.replace(
        release, sampling=secure.sampling, sampling_rate=config.rounds.goal / secure.population
    )
    # One client replaced by another may change the sum by twice the norm; the noise is what it is.
    sensitivity = sampled.sensitivity_per_clip_norm
    return msgspec.structs.replace(
        sampled,
        noise_multiplier=release.noise_multiplier / sensitivity,
        l2_sensitivity=release.l2_sensitivity * sensitivity,
    )


def with_noise(config: FederationConfig, strategy: Strategy, num_parameters: int) -> Strategy:
    """The strategy, private if the clients add noise.

    Raises:
        PrivacyError: the grid is too fine or too coarse for the noise.
    """
    settings = round_settings(config, number=1, num_parameters=num_parameters, state={}, largest_weight=1)
    noise, max_norm = noise_of(settings), config.secure_aggregation.max_norm
    if noise is None:
        return strategy
    private = Private(
        release=_sampled(config, noise.release),
        clip_norm=lambda _state: max_norm,
        population=config.secure_aggregation.population,
    )
    return replace(strategy, private=private)


def remembered(
    config: FederationConfig,
    state: ServerState,
    settings: Settings,
    total: Total,
    support: npt.NDArray[np.int64],
    num_parameters: int,
) -> ServerState:
    """What the next round's settings are made of, with all that was remembered before."""
    secure = config.secure_aggregation
    known = dict(state)
    if secure.adapt_range:
        following = next_range(settings.quantizer.range, total.octaves, clipped=secure.clipped)
        known[RANGE] = np.array([following], np.float64)
    if secure.support == "last-sum":
        last = np.zeros(num_parameters, np.float32)
        last[support] = total.mean
        known[LAST_SUM] = last
    return known

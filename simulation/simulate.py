"""A federation in one process.

What a device and a coordinator would compute, bit for bit where it matters (training, encoding, decoding,
folding), without messages, processes and waiting: for experiments and benchmarks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edgetrain.coordinator.clients.roster import select_random
from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.downlink import Downlink
from edgetrain.coordinator.strategies import (
    Contribution,
    ServerState,
    Setting,
    Strategy,
    StrategyTable,
    make_strategy,
)
from edgetrain.edge_client.errors import TrainingError
from edgetrain.edge_client.runtimes import Session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.edge_client.training.trainer import evaluate
from edgetrain.protocol import CodecError
from edgetrain.protocol.codecs import CodecSpec, Limits, SparseOrDense, decode
from edgetrain.protocol.groups import elements_of
from edgetrain.protocol.privacy.randomness import bernoulli
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.vectors import Vector
from edgetrain.simulation.virtual_client import LocalResult, VirtualClient

Tamper = Callable[[int, Mapping[str, LocalResult]], Mapping[str, LocalResult]]
"""What attackers do to the updates of a round before they are sent: `tamper(round, results) -> results`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """One experiment."""

    rounds: int
    clients_per_round: int
    training: TrainingConfig
    codec: str = "dense|float32"
    downlink_codec: str = "dense|float32"
    # Whether clients keep what compression left out and send it later.
    error_feedback: bool = True
    strategy: StrategyTable = "fedavg"
    # Parameters that stay on the clients, as file name patterns.
    personal: tuple[str, ...] = ()
    seed: int = 0
    # Evaluate every so many rounds, and after the last.
    evaluate_every: int = 1


@dataclass(frozen=True, slots=True)
class SimulatedRound:
    """What a round came to."""

    round: int
    # On the test data; None where not evaluated.
    loss: float | None
    accuracy: float | None
    # Mean training loss of the clients whose updates were accepted, weighted by examples.
    train_loss: float
    # Bytes of all updates, and of what each client was sent, patches counted once per client.
    bytes_up: int
    bytes_down: int
    # After the round.
    parameters: Vector
    # Clients whose updates were refused, with the reason.
    refused: Mapping[str, str]
    # Clients that could not train, with the reason.
    declined: Mapping[str, str]


def simulate(
    session: Session,
    parameters: Vector,
    shards: Sequence[Dataset],
    test: Dataset,
    config: SimulationConfig,
    *,
    tamper: Tamper | None = None,
) -> Iterator[SimulatedRound]:
    """Runs a federation, yielding after every round.

    Args:
        session: one session serves all clients in turn.
        parameters: to start from, float32 [num_parameters].
        shards: one data set per client.
        test: held out.
        config: what to do.
        tamper: attackers, if there are some.

    Raises:
        ConfigError, CodecError: the settings make no sense.
    """
    codec = CodecSpec.parse(config.codec)
    count = min(config.clients_per_round, len(shards))
    setting = Setting(codec=codec, training=config.training, minimum=count, goal=count)
    strategy = make_strategy(config.strategy, setting)
    personal = elements_of(session.manifest, config.personal)
    clients = {
        f"client-{number:05d}": VirtualClient(
            session, shard, codec, error_feedback=config.error_feedback, personal=personal
        )
        for number, shard in enumerate(shards)
    }
    state: ServerState = {}
    downlink = Downlink(CodecSpec.parse(config.downlink_codec))
    training = strategy.training(config.training)
    private = strategy.private
    for number in range(1, config.rounds + 1):
        if private:
            training = msgspec.structs.replace(training, max_delta_norm=private.clip_norm(state))
        release = downlink.release(parameters, seed=config.seed + number)
        sent = release.patches[-1].data if release.patches else release.whole
        control = None
        if strategy.control:
            data = downlink.encode(strategy.control(len(parameters), state), seed=number)
            control, sent = decode(data, Limits(max_parameters=len(parameters))).dense(), sent + data
        chosen = _chosen(strategy, sorted(clients), count, config.seed, number)
        trained: dict[str, LocalResult] = {}
        declined: dict[str, str] = {}
        for name in chosen:
            seed = config.seed + 1_000_003 * number + int(name.removeprefix("client-"))
            try:
                trained[name] = clients[name].train(release.public, training, control=control, seed=seed)
            except TrainingError as error:
                declined[name] = str(error)
        results: Mapping[str, LocalResult] = trained
        if tamper:
            results = tamper(number, results)
        partial = strategy.init(len(parameters), state)
        refused: dict[str, str] = {}
        for name, result in results.items():
            try:
                partial = strategy.fold(partial, _contribution(strategy, name, result, training, parameters))
            except (CodecError, UpdateRefused) as error:
                refused[name] = str(error)
            clients[name].settle(result, accepted=name not in refused)
        if len(refused) < len(results) or private:
            before = parameters
            parameters, state = strategy.finish(partial, parameters, state)
            parameters[personal] = before[personal]
        due = number % config.evaluate_every == 0 or number == config.rounds
        summary = evaluate(session, parameters, test) if due else None
        accuracy = None if summary is None else summary.metrics.get("correct")
        counted = [result for name, result in results.items() if name not in refused]
        examples = sum(result.num_examples for result in counted)
        yield SimulatedRound(
            round=number,
            loss=None if summary is None else summary.loss,
            accuracy=None if accuracy is None else float(accuracy),
            train_loss=sum(result.loss * result.num_examples for result in counted) / max(examples, 1),
            bytes_up=sum(len(result.update) + len(result.control) for result in results.values()),
            bytes_down=len(sent) * len(chosen),
            parameters=parameters,
            refused=refused,
            declined=declined,
        )


def _chosen(strategy: Strategy, names: list[str], count: int, seed: int, number: int) -> list[str]:
    """The clients of a round; where privacy counts on chance, drawn as it says."""
    release = strategy.private.release if strategy.private else None
    if release and release.sampling == "poisson":
        coins = bernoulli(os.urandom, release.sampling_rate, len(names))
        return [name for name, coin in zip(names, coins, strict=True) if coin]
    return select_random(names, count, seed=seed, round_number=number, attempt=1)


def _contribution(
    strategy: Strategy, name: str, result: LocalResult, training: TrainingConfig, parameters: Vector
) -> Contribution:
    return Contribution(
        name,
        result.num_examples,
        result.steps,
        _decoded(result.update, parameters),
        training=training,
        control=_decoded(result.control, parameters) if strategy.control else None,
        unclipped=result.unclipped,
    )


def _decoded(data: bytes, parameters: Vector) -> SparseOrDense:
    update = decode(data, Limits(max_parameters=len(parameters)))
    if update.num_parameters != len(parameters):
        raise UpdateRefused(f"the update has {update.num_parameters} parameters, the model has {len(parameters)}")
    return update

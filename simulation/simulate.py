"""A federation in one process.

What a device and a coordinator would compute, bit for bit where it matters (training, encoding, decoding,
folding), without messages, processes and waiting: for experiments and benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.clients import select_random
from edgetrain.coordinator.downlink import Downlink
from edgetrain.coordinator.strategies import Contribution, ServerState, make_strategy
from edgetrain.edge_client.data import Dataset
from edgetrain.edge_client.runtimes import Session
from edgetrain.edge_client.trainer import evaluate, train
from edgetrain.protocol.codecs import CodecSpec, Limits, decode, encode, residual
from edgetrain.protocol.training import TrainingConfig

Vector = npt.NDArray[np.float32]


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
    strategy: str = "fedavg"
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
    # Mean training loss of the clients, weighted by examples.
    train_loss: float
    # Bytes of all updates, and of what each client was sent, patches counted once per client.
    bytes_up: int
    bytes_down: int
    # After the round.
    parameters: Vector


def simulate(
    session: Session,
    parameters: Vector,
    shards: Sequence[Dataset],
    test: Dataset,
    config: SimulationConfig,
) -> Iterator[SimulatedRound]:
    """Runs a federation, yielding after every round.

    Args:
        session: one session serves all clients in turn.
        parameters: to start from, float32 [num_parameters].
        shards: one data set per client.
        test: held out.
        config: what to do.
    """
    strategy = make_strategy(config.strategy)
    state: ServerState = {}
    codec, downlink = CodecSpec.parse(config.codec), Downlink(CodecSpec.parse(config.downlink_codec))
    offsets = tuple(entry.offset for entry in session.manifest.parameters)
    limits = Limits(max_parameters=len(parameters))
    residuals: dict[int, Vector] = {}
    names = {f"client-{number:05d}": number for number in range(len(shards))}
    for number in range(1, config.rounds + 1):
        release = downlink.release(parameters, seed=config.seed + number)
        partial = strategy.init(len(parameters), state)
        chosen = select_random(
            sorted(names), config.clients_per_round, seed=config.seed, round_number=number, attempt=1
        )
        bytes_up = bytes_down = examples = 0
        train_loss = 0.0
        for name in chosen:
            client = names[name]
            seed = config.seed + 1_000_003 * number + client
            result = train(session, release.public, shards[client], config.training, seed=seed)
            target = result.parameters - release.public
            if config.error_feedback:
                target += residuals.get(client, np.float32(0))
            payload = encode(target, codec, seed=seed, offsets=offsets)
            if config.error_feedback:
                residuals[client] = residual(target, payload)
            update = decode(payload, limits)
            partial = strategy.fold(partial, Contribution(name, result.num_examples, result.steps, update))
            bytes_up += len(payload)
            bytes_down += len(release.patches[-1].data if release.patches else release.whole)
            examples += result.num_examples
            train_loss += result.loss * result.num_examples
        parameters, state = strategy.finish(partial, parameters, state)
        due = number % config.evaluate_every == 0 or number == config.rounds
        summary = evaluate(session, parameters, test) if due else None
        accuracy = None if summary is None else summary.metrics.get("correct")
        yield SimulatedRound(
            round=number,
            loss=None if summary is None else summary.loss,
            accuracy=None if accuracy is None else float(accuracy),
            train_loss=train_loss / examples,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            parameters=parameters,
        )

"""Putting a coordinator together from its settings: bundle, run directory, evaluation, transport."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.authority.broker import FederationBroker
from edgetrain.coordinator.authority.reload import reload_by
from edgetrain.coordinator.broker import start_broker
from edgetrain.coordinator.buffered import BufferedCoordinator
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.evaluation import Evaluation
from edgetrain.coordinator.events import Observer
from edgetrain.coordinator.observability import observers
from edgetrain.coordinator.run.records import Summary
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.secure.coordinator import SecureCoordinator
from edgetrain.coordinator.strategies import make_strategy
from edgetrain.coordinator.workers.lead import check_workers
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.training.trainer import evaluate
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import CodecSpec
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.names import check_name
from edgetrain.protocol.transport.connection import RECEIVE_MAXIMUM_OF_MANY
from edgetrain.protocol.transport.mqtt import MqttTransport

logger = logging.getLogger(__name__)


def serve(config: FederationConfig, observe: Observer) -> Summary:
    """Runs a federation over MQTT until it ends.

    Raises:
        EdgetrainError: bad settings, no broker, too few clients, …; the message says what and what to do.
    """
    check_name(config.federation, "federation")
    CodecSpec.parse(config.codec)
    CodecSpec.parse(config.downlink_codec)
    check_workers(config, make_strategy(config.strategy))
    if config.start_broker == "embedded" and config.enrolments:
        raise ConfigError("start_broker: the embedded broker knows no certificates; with enrolments use mosquitto")
    reload_broker: Callable[[], None] = reload_by(config.reload_command) if config.reload_command else _tell_to_reload
    bundle = Bundle(config.bundle)
    evaluator = Evaluator(bundle, config) if config.evaluation.data else None
    with contextlib.ExitStack() as stack:
        directory = RunDirectory(config, bundle.manifest, bundle.digest)
        stack.callback(directory.close)
        if config.start_broker == "mosquitto" and config.enrolments:
            broker = FederationBroker(Path(config.enrolments), config.broker.port)
            stack.callback(broker.stop)
            reload_broker = broker.reload
        elif config.start_broker:
            stack.callback(start_broker(config.start_broker, port=config.broker.port).stop)
        # One coordinator per run directory: the broker's session is the run's.
        client_id = f"edgetrain/{config.federation}/coordinator/{directory.run.hex()[:8]}"
        transport = MqttTransport(config.broker, client_id=client_id, most_received=RECEIVE_MAXIMUM_OF_MANY)
        stack.callback(transport.close)
        told = stack.enter_context(
            observers(config.observability, federation=config.federation, directory=directory.path, also=observe)
        )
        return coordinator_kind(config)(
            config,
            bundle=bundle,
            transport=transport,
            directory=directory,
            evaluate=evaluator,
            observe=told,
            reload_broker=reload_broker,
        ).run()


def _tell_to_reload() -> None:
    logger.warning(
        "the enrolments have changed: let the broker read its files again (mosquitto: kill -HUP), or set reload_command"
    )


def coordinator_kind(config: FederationConfig) -> type[Coordinator]:
    """The coordinator for a strategy: of rounds, or of a buffer that clients fill at their own pace.

    Raises:
        ConfigError: there is no such strategy.
    """
    if config.secure_aggregation.enabled:
        return SecureCoordinator
    return BufferedCoordinator if make_strategy(config.strategy).asynchronous else Coordinator


class Evaluator:
    """Held-out loss and accuracy through the same session that devices use.

    Raises:
        SessionError, DataError: the bundle or the data cannot be used here.
    """

    def __init__(self, bundle: Bundle, config: FederationConfig) -> None:
        self._session = open_session(bundle, threads=config.evaluation.threads)
        self._data = load_dataset(config.evaluation.data, bundle.manifest)

    def __call__(self, parameters: npt.NDArray[np.float32]) -> Evaluation:
        """Evaluates."""
        summary = evaluate(self._session, parameters, self._data)
        correct = summary.metrics.get("correct")
        return Evaluation(summary.loss, None if correct is None else float(correct))

"""A worker's life: connected to the broker, it works until it is told to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.workers.messages import Failed, Report, Started, Stop
from edgetrain.coordinator.workers.worker import Worker
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.names import Topics
from edgetrain.protocol.transport import Noticed, Received, Transport
from edgetrain.protocol.transport.connection import RECEIVE_MAXIMUM_OF_MANY
from edgetrain.protocol.transport.mqtt import MqttTransport

# Events handled before the journal is synced and reports go out: one sync serves them all.
BATCH_EVENTS = 512
_POLL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerSetting:
    """What a worker needs to know when it starts."""

    config: FederationConfig
    run: bytes
    # Which of the workers it is, from 0, and how many had its place before it.
    number: int
    life: int


def connect(setting: WorkerSetting) -> MqttTransport:
    """A worker's own connection. Its session ends with it: what the broker has for it then goes to the others.

    Raises:
        TransportError: no broker there.
        ConfigError: it has no shared subscriptions.
    """
    config = setting.config
    name = f"edgetrain/{config.federation}/worker/{setting.run.hex()[:8]}/{setting.number}"
    broker = msgspec.structs.replace(config.broker, mqtt_version="5")
    transport = MqttTransport(broker, client_id=name, lasting=False, most_received=RECEIVE_MAXIMUM_OF_MANY)
    if not transport.shares_subscriptions:
        transport.close()
        raise ConfigError(
            f"workers: the MQTT broker at {config.broker.host}:{config.broker.port} has no shared subscriptions; use "
            "another broker (mosquitto has them), or no workers"
        )
    return transport


def work(setting: WorkerSetting, transport: Transport, report: Callable[[Sequence[Report]], None]) -> None:
    """Works until a `Stop` is delivered.

    Args:
        setting: which worker this is.
        transport: connected; commands are delivered to it as `Noticed`.
        report: gets reports, some at a time.
    """
    config = setting.config
    worker = Worker(config, report)
    group = f"edgetrain-{setting.run.hex()[:8]}"
    transport.subscribe(Topics.shared(group, Topics(config.federation).from_client("+", "blob")))
    report([Started()])
    try:
        while _work_on(worker, transport):
            worker.flush()
    except RunError as error:
        report([Failed(str(error))])
    finally:
        worker.close()


def _work_on(worker: Worker, transport: Transport) -> bool:
    """Handles what there is; whether to go on."""
    event = transport.receive(_POLL_SECONDS)
    handled = 0
    while event is not None:
        match event:
            case Received():
                worker.on_message(event)
            case Noticed(notice=Stop()):
                return False
            case Noticed():
                worker.on_command(event.notice)  # type: ignore[arg-type]
        handled += 1
        # What is taken out of the queue is handled: nothing more is taken after the last.
        event = transport.receive(0) if handled < BATCH_EVENTS else None
    return True

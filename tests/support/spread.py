"""Clients that make up their updates, all over one connection to a real broker, and a coordinator with workers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from edgetrain.coordinator import events
from edgetrain.coordinator.broker import Mosquitto, free_port
from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.run.records import Summary
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.protocol import encode
from edgetrain.protocol.blobs import blob_ref, cut
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import supported_stages
from edgetrain.protocol.messages import (
    Announce,
    Hello,
    Message,
    Offer,
    Plan,
    Ready,
    Verdict,
    Want,
    Welcome,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal, unseal
from edgetrain.protocol.transport import Received
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport

# Small enough that every update comes in several pieces, large enough that the broker mixes them well.
CHUNK_BYTES = 100


class Crowd:
    """Clients in one thread. As in `support.scripted`, a delta depends on name and round only.

    Args:
        broker: where.
        names: of the clients; every other one sends its updates in pieces.
        hold_back: those that send half of their pieces, and the rest when they are asked for it.
    """

    def __init__(self, broker: BrokerConfig, names: list[str], hold_back: set[str]) -> None:
        self.names, self.hold_back = names, hold_back
        self.topics = Topics("f")
        self.keys = {name: SigningKey(name.encode().ljust(32, b".")) for name in names}
        self.pending: dict[str, tuple[Offer, bytes]] = {}
        self.verdicts: list[tuple[str, Verdict]] = []
        self.bundle = b""
        self.transport = MqttTransport(broker, client_id="crowd")
        self.transport.subscribe(self.topics.announce)
        self.transport.subscribe(self.topics.to_client("+", "message"))
        # The coordinator has said so, after its last verdict.
        self.over = threading.Event()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.ended.is_set():
            event = self.transport.receive(0.2)
            if isinstance(event, Received):
                name = event.topic.split("/")[-2]
                self.on_message(name, decode_from_coordinator(unseal(event.payload).body))

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.transport.close()

    def send(self, name: str, message: Message) -> None:
        payload = seal(self.keys[name], "f", name, encode_message(message))
        self.transport.publish(self.topics.from_client(name, "message"), payload)

    def on_message(self, name: str, message: Any) -> None:
        match message:
            case Announce(status="open") if name in self.keys or not self.bundle:
                self.bundle = message.bundle.digest
                for one in [name] if name in self.keys else self.names:
                    self.send(
                        one,
                        Hello(
                            public_key=self.keys[one].public_key, connection=bytes(16), edgetrain="0",
                            runtimes=("onnxruntime",), stages=tuple(supported_stages()),
                        ),
                    )  # fmt: skip
            case Announce(status="ended"):
                self.over.set()
            case Welcome():
                self.send(name, Ready(bundle=self.bundle, runtime="onnxruntime", num_examples=10))
            case Plan():
                self.on_plan(name, message)
            case Want() if name in self.pending:
                self.upload(name, message.ranges)
            case Verdict():
                self.verdicts.append((name, message))
                self.pending.pop(name, None)

    def on_plan(self, name: str, plan: Plan) -> None:
        generator = np.random.default_rng([plan.round, *name.encode()])
        delta = generator.normal(0, 0.1, plan.parameters.size // 4 - 1).astype(np.float32)
        update = encode(delta, plan.codec)
        offer = Offer(run=plan.run, round=plan.round, nonce=plan.nonce, update=blob_ref(update), num_examples=10,
                      steps=1, metrics={"loss": 1.0})  # fmt: skip
        self.pending[name] = (offer, update)
        self.send(name, offer)
        half = len(update) // 2
        self.upload(name, ((0, half),) if name in self.hold_back else ())

    def upload(self, name: str, ranges: tuple[tuple[int, int], ...]) -> None:
        offer, update = self.pending[name]
        size = CHUNK_BYTES if self.names.index(name) % 2 else len(update)
        for chunk in cut(offer.update, update, ranges, chunk_bytes=size):
            self.transport.publish(self.topics.from_client(name, "blob"), chunk)


def serve_with_workers(
    bundle: Path, out: Path, workers: str, names: list[str], kill: Any = None
) -> tuple[Summary, Any]:
    """Two rounds over a real broker.

    Args:
        bundle: to train.
        out: run directory.
        workers: as of the settings.
        names: of the clients.
        kill: is called once with the crew, when a third of the first round's updates are accepted and others are
            half uploaded.

    Returns:
        The summary, and the crowd with what it was told.
    """
    broker = Mosquitto(free_port())
    address = BrokerConfig(host="127.0.0.1", port=broker.port)
    opened = Bundle(bundle)
    config = FederationConfig(
        federation="f",
        bundle=str(bundle),
        out=str(out),
        broker=address,
        workers=workers,
        codec="dense|float32",
        rounds=RoundsConfig(total=2, goal=len(names), gather_seconds=60.0, deadline_seconds=120.0),
        evaluation=EvaluationConfig(by_clients=False),
    )
    directory = RunDirectory(config, opened.manifest, opened.digest)
    transport = MqttTransport(address, client_id="coordinator")
    crowd = Crowd(address, names, hold_back=set(names[: len(names) // 3]) if kill else set())

    def observe(event: events.Event) -> None:
        nonlocal kill
        if isinstance(event, events.UpdateAccepted) and event.accepted == len(names) // 3 and kill:
            crowd.hold_back.clear()
            foreman = coordinator._uploads.foreman
            assert foreman
            kill(foreman._crew)
            kill = None

    coordinator = Coordinator(config, bundle=opened, transport=transport, directory=directory, observe=observe)
    try:
        summary = coordinator.run()
        assert crowd.over.wait(20)
        return summary, crowd
    finally:
        crowd.close()
        transport.close()
        directory.close()
        broker.stop()

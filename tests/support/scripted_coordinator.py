"""A coordinator as a script, for tests of the real client: it does what a test says, in the real protocol."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.post import Post
from edgetrain.protocol import encode
from edgetrain.protocol.blobs import Assembler, parse_chunk
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.messages import (
    Hello,
    Offer,
    Plan,
    Ready,
    RoundClosed,
    Verdict,
    Want,
    Welcome,
    decode_from_client,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, unseal, verify
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport import MemoryBroker, Received
from edgetrain.protocol.vectors import vector_digest
from support.scripted import FEDERATION, Clock

TRAINING = TrainingConfig(epochs=1, batch_size=4, learning_rate=0.1)


class ScriptedCoordinator:
    """Welcomes everyone, serves blobs, notes what it hears; the rest is in the hooks.

    Args:
        broker: in memory.
        clock: the test's.
        bundle: path of the bundle to train.
        key: signing key; a fixed one if left out.
    """

    def __init__(self, broker: MemoryBroker, clock: Clock, bundle: Path, *, key: SigningKey | None = None) -> None:
        self.clock = clock
        self.topics = Topics(FEDERATION)
        self.key = key or SigningKey(b"coordinator".ljust(32))
        self.bundle = Bundle(bundle)
        self.run = os.urandom(16)
        self.transport = broker.connect()
        self.transport.subscribe(self.topics.from_client("+", "#"))
        self.blobs = BlobServer(self.topics, self.transport)
        self.manifest = self.blobs.add(self.bundle.manifest_bytes)
        for entry in self.bundle.manifest.files():
            self.blobs.add(self.bundle.read(entry))
        self.new_run(self.run)
        self.client_key = b""
        self.client = ""
        self.heard: list[Any] = []
        self.wanted: list[bytes] = []
        self.updates: list[tuple[Offer, bytes]] = []
        self._uploads: dict[bytes, tuple[Offer, Assembler]] = {}
        self.on_ready: Callable[[Ready], None] = lambda _ready: None
        self.on_update: Callable[[Offer, bytes], None] = lambda _offer, _update: None
        self.on_message: Callable[[Any], None] = lambda _message: None
        # Before a Want is served; False drops it.
        self.on_want: Callable[[Want], bool] = lambda _want: True
        # Whenever the client waits and nothing has come.
        self.on_idle: Callable[[], None] = lambda: None

    def new_run(self, run: bytes) -> None:
        self.run = run
        self.post = Post(self.transport, self.topics, self.key, run=run, bundle=self.manifest)

    def plan(self, parameters: np.ndarray, number: int = 1, **changes: Any) -> Plan:
        """A plan to train from these parameters, not yet sent."""
        fields: dict[str, Any] = {
            "run": self.run,
            "round": number,
            "nonce": number.to_bytes(16, "little"),
            "bundle": self.bundle.digest,
            "vector": vector_digest(parameters),
            "parameters": self.blobs.add(encode(parameters, "dense|float32")),
            "training": TRAINING,
            "deadline_seconds": 60.0,
            "seed": 3,
        }
        return Plan(**(fields | changes))

    def send(self, message: Any) -> None:
        self.post.send(self.client, message)

    def close_round(self, plan: Plan) -> None:
        self.post.broadcast(RoundClosed(run=plan.run, round=plan.round, nonce=plan.nonce))

    def verdict(self, offer: Offer, *, accepted: bool = True, reason: str = "") -> None:
        self.send(Verdict(round=offer.round, digest=offer.update.digest, accepted=accepted, reason=reason))

    def act(self) -> None:
        busy = False
        while (event := self.transport.receive(0)) is not None:
            if isinstance(event, Received):
                busy = True
                self._on_received(event)
        self.blobs.tick(self.clock.now)
        if not busy:
            self.on_idle()

    def drain(self) -> None:
        """Notes what has come without acting on it."""
        while (event := self.transport.receive(0)) is not None:
            if isinstance(event, Received) and event.topic.endswith("/message"):
                self.heard.append(decode_from_client(unseal(event.payload).body))

    def _on_received(self, event: Received) -> None:
        sender = self.topics.sender(event.topic)
        assert sender is not None
        self.client = sender[0]
        if sender[1] == "blob":
            chunk = parse_chunk(event.payload)
            offer, assembler = self._uploads[chunk.digest]
            if assembler.add(chunk):
                update = assembler.finish()
                self.updates.append((offer, update))
                self.on_update(offer, update)
            return
        envelope = unseal(event.payload)
        message = decode_from_client(envelope.body)
        self.client_key = message.public_key if isinstance(message, Hello) else self.client_key
        verify(envelope, FEDERATION, self.client_key)
        self.heard.append(message)
        match message:
            case Hello():
                self.send(Welcome(run=self.run))
            case Ready():
                self.on_ready(message)
            case Offer():
                self._uploads.setdefault(message.update.digest, (message, Assembler(message.update, limit=1 << 20)))
            case Want():
                self.wanted.append(message.digest)
                if self.on_want(message):
                    self.blobs.want(self.client, message.digest, message.ranges, self.clock.now, message.chunk_bytes)
        self.on_message(message)

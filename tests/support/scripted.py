"""A coordinator and its clients in one thread, over a broker in memory, on a clock that tests own.

The coordinator is the real one. When it waits, the clients act; when nobody has anything to do, time passes.
The clients are scripts that write the protocol's real messages, so they can misbehave at any point.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgetrain.coordinator import events
from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.run.records import Summary
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.protocol import encode
from edgetrain.protocol.blobs import blob_ref, cut, parse_chunk
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import supported_stages
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Goodbye,
    Hello,
    Message,
    Offer,
    Plan,
    Ready,
    Refusal,
    Verdict,
    Want,
    Welcome,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal, unseal, verify
from edgetrain.protocol.transport import Event, MemoryBroker, MemoryTransport, Received

FEDERATION = "f"
# As the real client does.
REPEAT_SECONDS = 10.0
# A run that takes longer on the test's clock is stuck.
LONGEST_SECONDS = 3600.0


class Crash(BaseException):
    """The coordinator's process ends here: nothing of ours may catch it."""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class DrivenTransport:
    """The coordinator's transport: waiting lets the clients act, then time pass."""

    def __init__(self, inner: MemoryTransport, clock: Clock, act: Callable[[], None]) -> None:
        self._inner = inner
        self._clock = clock
        self._act = act
        self._end = clock.now + LONGEST_SECONDS

    def receive(self, timeout: float) -> Event | None:
        event = self._inner.receive(0)
        if event is None and timeout > 0:
            self._act()
            event = self._inner.receive(0)
            if event is None:
                self._clock.now += timeout
                assert self._clock.now < self._end, "the run is stuck"
        return event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class ScriptedClient:
    """An honest client, but that it makes up its deltas instead of training.

    Args:
        broker: in memory.
        name: of the client.
        clock: the test's.
        num_examples: its weight.
    """

    def __init__(self, broker: MemoryBroker, name: str, clock: Clock, *, num_examples: int = 10) -> None:
        self.name = name
        self.num_examples = num_examples
        self.clock = clock
        self.key = SigningKey(name.encode().ljust(32, b"."))
        self.topics = Topics(FEDERATION)
        self.connection = os.urandom(16)
        will = (self.topics.from_client(name, "message"), self.sealed(self.goodbye("connection lost")))
        self.transport = broker.connect(will=will)
        for topic in (self.topics.announce, self.topics.round, self.topics.to_client(name, "#")):
            self.transport.subscribe(topic)
        self.coordinator_key = b""
        self.run = b""
        self.bundle = b""
        self.ready = False
        self.plans: list[Plan] = []
        self.verdicts: list[Verdict] = []
        self.refusals: list[Refusal] = []
        self.chunks: dict[bytes, int] = {}
        # The update without a verdict.
        self.pending: tuple[Offer, bytes] | None = None
        self.deferred: Plan | None = None
        self.answered: set[bytes] = set()
        self.last_sent = clock.now

    # --- what a misbehaving client overrides ---------------------------------------------------------

    def delta(self, plan: Plan) -> np.ndarray:
        """Float32 [num_parameters]: depends on name and round only."""
        seed = [plan.round, *self.name.encode()]
        return np.random.default_rng(seed).normal(0, 0.1, self.num_parameters(plan)).astype(np.float32)

    def on_plan(self, plan: Plan) -> None:
        if self.pending:
            self.deferred = plan  # one thing after the other
        elif plan.nonce not in self.answered:
            self.answer(plan)

    def on_verdict(self, verdict: Verdict) -> None:
        if self.pending and self.pending[0].update.digest == verdict.digest:
            self.pending = None
            plan, self.deferred = self.deferred, None
            if plan:
                self.on_plan(plan)

    # --- steps ---------------------------------------------------------------------------------------

    def num_parameters(self, plan: Plan) -> int:
        """From the size of the dense float32 parameters: 4 bytes each, and a header."""
        return plan.parameters.size // 4 - 1

    def answer(self, plan: Plan, **changes: Any) -> None:
        """Offers the update and sends its chunks."""
        self.answered.add(plan.nonce)
        update = encode(self.delta(plan), plan.codec)
        offer = self.offer(plan, update, **changes)
        self.pending = (offer, update)
        self.send(offer)
        self.send_chunks(offer.update, update)

    def offer(self, plan: Plan, payload: bytes, **changes: Any) -> Offer:
        fields: dict[str, Any] = {
            "run": plan.run,
            "round": plan.round,
            "nonce": plan.nonce,
            "update": blob_ref(payload),
            "num_examples": self.num_examples,
            "steps": 1,
            "metrics": {"loss": 1.0},
        }
        return Offer(**(fields | changes))

    def hello(self, **changes: Any) -> Hello:
        fields: dict[str, Any] = {
            "public_key": self.key.public_key,
            "connection": self.connection,
            "edgetrain": "0",
            "runtimes": ("onnxruntime",),
            "stages": tuple(supported_stages()),
        }
        return Hello(**(fields | changes))

    def goodbye(self, reason: str) -> Goodbye:
        return Goodbye(reason=reason, connection=self.connection)

    def say_ready(self) -> None:
        self.ready = True
        self.send(Ready(bundle=self.bundle, runtime="onnxruntime", num_examples=self.num_examples))

    def sealed(self, message: Message, *, key: SigningKey | None = None, sender: str | None = None) -> bytes:
        return seal(key or self.key, FEDERATION, sender or self.name, encode_message(message))

    def send(self, message: Message) -> None:
        self.send_raw(self.sealed(message))

    def send_raw(self, payload: bytes, kind: str = "message") -> None:
        self.last_sent = self.clock.now
        self.transport.publish(self.topics.from_client(self.name, kind), payload)

    def send_chunks(self, ref: BlobRef, update: bytes, ranges: Sequence[tuple[int, int]] = ()) -> None:
        for chunk in cut(ref, update, ranges):
            self.send_raw(chunk, "blob")

    # --- driving -------------------------------------------------------------------------------------

    def act(self) -> None:
        """Handles what has arrived; repeats an offer that nobody has answered."""
        while (event := self.transport.receive(0)) is not None:
            if isinstance(event, Received):
                self._on_received(event)
        if self.pending and self.clock.now - self.last_sent >= REPEAT_SECONDS:
            self.send(self.pending[0])

    def _on_received(self, event: Received) -> None:
        if "/blob" in event.topic:
            chunk = parse_chunk(event.payload)
            self.chunks[chunk.digest] = self.chunks.get(chunk.digest, 0) + len(chunk.data)
            return
        envelope = unseal(event.payload)
        message = decode_from_coordinator(envelope.body)
        if isinstance(message, Announce):
            verify(envelope, FEDERATION, message.public_key)
            self.coordinator_key, self.run, self.bundle = message.public_key, message.run, message.bundle.digest
            if message.status == "open":
                self.send(self.hello())
                if self.ready:
                    self.say_ready()
                if self.pending:
                    self.send(self.pending[0])
            return
        if not self.coordinator_key:
            return
        verify(envelope, FEDERATION, self.coordinator_key)
        match message:
            case Welcome():
                if not self.ready:
                    self.say_ready()
            case Plan():
                self.plans.append(message)
                if message.task == "train":
                    self.on_plan(message)
            case Verdict():
                self.verdicts.append(message)
                self.on_verdict(message)
            case Refusal():
                self.refusals.append(message)
            case Want():
                if self.pending and self.pending[0].update.digest == message.digest:
                    self.send_chunks(self.pending[0].update, self.pending[1], message.ranges)


class ScriptedFederation:
    """One run directory, one broker, some clients, and as many coordinators in turn as a test needs."""

    def __init__(self, bundle: Path, out: Path, **settings: Any) -> None:
        self.clock = Clock()
        self.broker = MemoryBroker()
        self.clients: list[ScriptedClient] = []
        self.bundle = Bundle(bundle)
        self.seen: list[events.Event] = []
        rounds = {"total": 3, "goal": 2, "deadline_seconds": 30.0, "gather_seconds": 5.0} | settings.pop("rounds", {})
        fields: dict[str, Any] = {
            "federation": FEDERATION,
            "bundle": str(bundle),
            "out": str(out),
            "codec": "dense|float32",
            "rounds": RoundsConfig(**rounds),
            "evaluation": EvaluationConfig(by_clients=False),
        }
        self.config = FederationConfig(**(fields | settings))
        self.out = out

    def add(self, name: str, kind: type[ScriptedClient] = ScriptedClient, **options: Any) -> ScriptedClient:
        client = kind(self.broker, name, self.clock, **options)
        self.clients.append(client)
        return client

    def act(self) -> None:
        for client in list(self.clients):
            client.act()

    def serve(self, observe: Callable[[events.Event], None] = lambda _event: None) -> Summary:
        """One coordinator's life."""

        def note(event: events.Event) -> None:
            self.seen.append(event)
            observe(event)

        inner = self.broker.connect()
        directory = RunDirectory(self.config, self.bundle.manifest, self.bundle.digest)
        try:
            return Coordinator(
                self.config,
                bundle=self.bundle,
                transport=DrivenTransport(inner, self.clock, self.act),
                directory=directory,
                observe=note,
                clock=self.clock,
            ).run()
        finally:
            self.act()
            self.broker.drop(inner)
            directory.close()

    def records(self) -> list[dict[str, Any]]:
        """rounds.jsonl."""
        lines = (self.out / "rounds.jsonl").read_bytes().splitlines()
        return [msgspec.json.decode(line) for line in lines]

    def refused(self) -> list[tuple[str, str]]:
        """(client, reason) of everything that was refused."""
        return [(event.client, event.reason) for event in self.seen if isinstance(event, events.Refused)]

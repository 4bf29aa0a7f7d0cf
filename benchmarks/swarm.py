"""Many connections in one process: clients that speak the protocol but make up their updates.

    python benchmarks/swarm.py '{"port": 1883, "names": ["c0", …], …}'

Signed messages, real chunks, one MQTT connection per client (or one for all, `shared`), no training. Prints a JSON
line with what every client was told when the run has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import selectors
import time
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from edgetrain.protocol import encode
from edgetrain.protocol.blobs import blob_ref, cut
from edgetrain.protocol.codecs import supported_stages
from edgetrain.protocol.messages import (
    Announce,
    Goodbye,
    Hello,
    Message,
    Offer,
    Plan,
    Ready,
    RoundClosed,
    Verdict,
    Want,
    Welcome,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal, unseal

FEDERATION = "load"
# As a real client does; a lost message costs this and nothing else.
REPEAT_SECONDS = 10.0


class Settings(msgspec.Struct, kw_only=True):
    """Of one driver process."""

    port: int
    names: list[str]
    num_parameters: int
    codec: str = "dense|int8"
    # Share of the clients that lose their connection in a round, some of them in the middle of an upload.
    churn: float = 0.0
    seed: int = 0


class Member:
    """One client."""

    def __init__(self, name: str, swarm: Swarm) -> None:
        self.name, self.swarm = name, swarm
        self.key = SigningKey(name.encode().ljust(32, b"."))
        self.connection = swarm.chance.randbytes(16)
        self.run = self.bundle = b""
        self.ready = False
        self.pending: tuple[Offer, bytes] | None = None
        self.sent_at = 0.0
        self.done: dict[bytes, None] = {}
        self.back_at = 0.0
        self.client: paho.Client | None = None
        self.connect()

    def connect(self) -> None:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self.name, protocol=MQTTProtocolVersion.MQTTv5)
        client.will_set(self.topic("message"), self.sealed(Goodbye(reason="lost", connection=self.connection)), qos=1)
        client.on_connect = self.on_connect
        client.on_message = lambda _c, _u, message: self.on_message(message.payload)
        client.connect("127.0.0.1", self.swarm.settings.port, 120, clean_start=True)
        self.client = client
        self.socket = client.socket()
        self.swarm.selector.register(self.socket, selectors.EVENT_READ, self)

    def drop(self, seconds: float) -> None:
        """As a network fault would: no DISCONNECT."""
        assert self.client is not None
        with contextlib.suppress(KeyError, ValueError):
            self.swarm.selector.unregister(self.socket)
        self.socket.close()
        self.client = None
        self.ready = False
        self.back_at = time.monotonic() + seconds
        self.connection = self.swarm.chance.randbytes(16)

    def on_connect(self, client: paho.Client, *_: Any) -> None:
        topics = self.swarm.topics
        client.subscribe([(topic, 1) for topic in (topics.to_client(self.name, "#"), topics.announce, topics.round)])

    # --- out -----------------------------------------------------------------------------------------

    def topic(self, kind: str) -> str:
        return self.swarm.topics.from_client(self.name, kind)

    def sealed(self, message: Message) -> bytes:
        return seal(self.key, FEDERATION, self.name, encode_message(message))

    def send(self, message: Message) -> None:
        if self.client:
            self.client.publish(self.topic("message"), self.sealed(message), qos=1)

    def upload(self, ranges: tuple[tuple[int, int], ...] = ()) -> None:
        assert self.pending
        for chunk in cut(self.pending[0].update, self.pending[1], ranges):
            if self.client:
                self.client.publish(self.topic("blob"), chunk, qos=1)

    def offer(self) -> None:
        assert self.pending
        self.sent_at = time.monotonic()
        self.send(self.pending[0])

    # --- in ------------------------------------------------------------------------------------------

    def on_message(self, payload: bytes) -> None:
        message = decode_from_coordinator(unseal(payload).body)
        match message:
            case Announce():
                self.run, self.bundle = message.run, message.bundle.digest
                if message.status == "ended":
                    self.swarm.ended.add(self.name)
                else:
                    self.send(
                        Hello(
                            public_key=self.key.public_key,
                            connection=self.connection,
                            edgetrain="0",
                            runtimes=("onnxruntime",),
                            stages=tuple(supported_stages()),
                        )
                    )
            case Welcome():
                self.ready = True
                self.send(Ready(bundle=self.bundle, runtime="onnxruntime", num_examples=10))
                if self.pending:
                    self.offer()
            case Plan() if message.task == "train":
                self.on_plan(message)
            case Verdict() if self.pending and message.digest == self.pending[0].update.digest:
                self.swarm.told.append((self.name, message.round, message.accepted))
                self.done[self.pending[0].nonce] = None
                self.pending = None
            case Want() if self.pending and message.digest == self.pending[0].update.digest:
                self.upload(message.ranges)
            case RoundClosed():
                self.swarm.closed.add(message.round)

    def on_plan(self, plan: Plan) -> None:
        if plan.nonce in self.done or self.pending:
            return
        update = self.swarm.update(self.name, plan)
        offer = Offer(
            run=plan.run,
            round=plan.round,
            nonce=plan.nonce,
            update=blob_ref(update),
            num_examples=10,
            steps=1,
            metrics={"loss": 1.0},
        )
        self.pending = (offer, update)
        self.offer()
        if self.swarm.chance.random() < self.swarm.settings.churn:
            # The upload is lost on the way; after its return, the offer is repeated and the rest asked for.
            self.drop(self.swarm.chance.uniform(0.05, 1.0))
        else:
            self.upload()


class Swarm:
    """All clients of this process, in one thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.chance = random.Random(settings.seed)  # noqa: S311
        self.topics = Topics(FEDERATION)
        self.selector = selectors.DefaultSelector()
        self.told: list[tuple[str, int, bool]] = []
        self.ended: set[str] = set()
        self.closed: set[int] = set()
        deltas = np.random.default_rng(settings.seed).normal(0, 1e-3, (8, settings.num_parameters))
        self._pool = [encode(delta.astype(np.float32), settings.codec, seed=0) for delta in deltas]
        self.members = [Member(name, self) for name in settings.names]

    def update(self, name: str, plan: Plan) -> bytes:
        """Encoded; one of a few."""
        return self._pool[hash((name, plan.round)) % len(self._pool)]

    def run(self) -> None:
        """Until the coordinator has ended the run for everyone who is there."""
        misc_at = 0.0
        while any(member.name not in self.ended for member in self.members):
            for key, _ in self.selector.select(0.02):
                member = key.data
                if member.client:
                    broken = member.client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS
                    # It may have dropped its connection by itself meanwhile.
                    if broken and member.client:
                        member.drop(0.5)
            now = time.monotonic()
            for member in self.members:
                if member.client is None:
                    if now >= member.back_at:
                        member.connect()
                elif member.client.want_write():
                    member.client.loop_write()
            if now - misc_at > 1.0:
                misc_at = now
                for member in self.members:
                    if member.client:
                        member.client.loop_misc()
                    if member.pending and member.ready and now - member.sent_at >= REPEAT_SECONDS:
                        member.offer()
        for member in self.members:
            if member.client:
                member.client.disconnect()
                member.client.loop_write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", help="JSON with the fields of `Settings`; load.py writes it")
    arguments = parser.parse_args()
    try:
        settings = msgspec.json.decode(arguments.settings, type=Settings)
    except msgspec.MsgspecError as error:
        parser.error(f"settings: {error}")
    swarm = Swarm(settings)
    swarm.run()
    print(json.dumps(swarm.told), flush=True)


if __name__ == "__main__":
    main()

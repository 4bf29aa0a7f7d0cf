"""The brokers that every transport test runs on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from edgetrain.coordinator.broker import EmbeddedBroker, Mosquitto, free_port
from edgetrain.protocol.blobs import Blob
from edgetrain.protocol.transport import Connected, Event, MemoryBroker, Received
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport
from support.websocket_bridge import WebSocketBridge

KINDS = ("memory", "mosquitto-5", "mosquitto-3.1.1", "mosquitto-websockets", "embedded", "embedded-websockets")
ARRIVAL_SECONDS = 20.0


class Wire:
    """A broker of one kind, its connections, and ways to disturb both."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._transports: list[Any] = []
        self._memory = MemoryBroker()
        self.port = 0 if kind in {"memory", "mosquitto-websockets"} else free_port()
        self._broker: Mosquitto | EmbeddedBroker | None = None
        self._bridge: WebSocketBridge | None = None
        if kind != "memory":
            self.start_broker()

    def config(self) -> BrokerConfig:
        version: Any = "3.1.1" if self.kind.startswith("embedded") or self.kind.endswith("3.1.1") else "auto"
        transport: Any = "websockets" if self.kind.endswith("websockets") else "tcp"
        return BrokerConfig(
            host="127.0.0.1", port=self.port, mqtt_version=version, transport=transport, will_delay_seconds=0
        )

    def connect(self, name: str, *, will: tuple[str, bytes] | None = None) -> Any:
        """A transport, with its `Connected` taken out."""
        if self.kind == "memory":
            transport: Any = self._memory.connect(will=will)
        else:
            transport = MqttTransport(self.config(), client_id=name, will=will)
        self._transports.append(transport)
        assert transport.receive(5) == Connected()
        return transport

    def drop(self, transport: Any) -> None:
        """Cuts a connection as a network fault would."""
        if self.kind == "memory":
            self._memory.drop(transport)
        else:
            transport._connection.client.interrupt()

    def stop_broker(self) -> None:
        if self._bridge:
            self._bridge.stop()
            self._bridge = None
        if self._broker:
            self._broker.stop()
            self._broker = None

    def start_broker(self) -> None:
        if self.kind == "mosquitto-websockets":
            self._broker = Mosquitto(free_port())
            self._bridge = WebSocketBridge(self.port, self._broker.port)
            self.port = self._bridge.port
        elif self.kind == "embedded-websockets":
            self._broker = EmbeddedBroker(free_port(), websocket_port=self.port)
        else:
            self._broker = Mosquitto(self.port) if self.kind.startswith("mosquitto") else EmbeddedBroker(self.port)

    def close(self) -> None:
        for transport in self._transports:
            transport.close()
        self.stop_broker()


class WatchedBlob(Blob):
    """A blob that does something when a byte of it is read."""

    def __init__(self, data: bytes, offset: int, act: Callable[[], None]) -> None:
        super().__init__(data)
        self._offset, self._act = offset, act

    def read(self, start: int, stop: int) -> memoryview:
        if start <= self._offset < stop:
            self._act()
        return super().read(start, stop)


def next_event(transport: Any, kind: type | Callable[[Event], bool]) -> Any:
    """The next event of a kind, others left out."""
    matches = (lambda event: isinstance(event, kind)) if isinstance(kind, type) else kind
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while time.monotonic() < deadline:
        event = transport.receive(0.5)
        if event is not None and matches(event):
            return event
    raise AssertionError(f"no {kind} within {ARRIVAL_SECONDS:.0f} s")


def received(transport: Any, count: int) -> list[tuple[str, bytes]]:
    """The next `count` messages."""
    messages = (next_event(transport, Received) for _ in range(count))
    return [(message.topic, message.payload) for message in messages]

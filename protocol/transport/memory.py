"""A broker in memory, for tests and simulations: the same semantics, no sockets, no threads."""

from __future__ import annotations

import contextlib
import functools
import queue
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal

from edgetrain.protocol.blobs import DEFAULT_CHUNK_BYTES, Blob, make_chunk
from edgetrain.protocol.ranges import RangeSet
from edgetrain.protocol.transport.base import Connected, Disconnected, Event, Received


def topic_matches(pattern: str, topic: str) -> bool:
    """Whether an MQTT topic filter matches (MQTT 5, section 4.7)."""
    return _expression(pattern).fullmatch(topic) is not None


@functools.lru_cache(maxsize=10_000)
def _expression(pattern: str) -> re.Pattern[str]:
    """A filter as a regular expression: a message is compared with those of every connection."""
    above, below = (pattern[:-2], "(/.*)?") if pattern.endswith("/#") else (pattern, "")
    if above == "#":
        return re.compile(".*", re.DOTALL)
    levels = ("[^/]*" if level == "+" else re.escape(level) for level in above.split("/"))
    return re.compile("/".join(levels) + below, re.DOTALL)


class MemoryBroker:
    """Delivers to the transports that were opened on it."""

    def __init__(self) -> None:
        self._transports: list[MemoryTransport] = []
        self._retained: dict[str, bytes] = {}
        # Messages so far of each shared subscription: its members take turns.
        self._shared: dict[str, int] = {}

    def connect(self, *, will: tuple[str, bytes] | None = None) -> MemoryTransport:
        """A connected transport; `will` is published if it is dropped."""
        transport = MemoryTransport(self, will)
        self._transports.append(transport)
        transport.deliver(Connected())
        return transport

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Fans a message out."""
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for transport in self._transports:
            if any(topic_matches(pattern, topic) for pattern in transport.subscriptions):
                transport.deliver(Received(topic, payload))
        for pattern, turn in self._shared.items():
            members = [transport for transport in self._transports if pattern in transport.subscriptions]
            if members and topic_matches(pattern.split("/", 2)[2], topic):
                self._shared[pattern] = turn + 1
                members[turn % len(members)].deliver(Received(topic, payload))

    def share(self, pattern: str) -> None:
        """Takes note of a shared subscription, `$share/GROUP/FILTER` (MQTT 5, section 4.8.2)."""
        self._shared.setdefault(pattern, 0)

    def replay_retained(self, transport: MemoryTransport, pattern: str) -> None:
        """What a new subscriber gets."""
        for topic, payload in self._retained.items():
            if topic_matches(pattern, topic):
                transport.deliver(Received(topic, payload))

    def drop(self, transport: MemoryTransport) -> None:
        """Cuts a connection as a network fault would: its will is published."""
        if transport in self._transports:
            self._transports.remove(transport)
            transport.deliver(Disconnected("connection dropped"))
            if transport.will:
                self.publish(*transport.will, retain=False)

    def restore(self, transport: MemoryTransport) -> None:
        """Brings a dropped connection back."""
        self._transports.append(transport)
        transport.deliver(Connected())

    def forget(self, transport: MemoryTransport) -> None:
        """Removes a transport that closed by itself."""
        if transport in self._transports:
            self._transports.remove(transport)


class MemoryTransport:
    """One connection to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, will: tuple[str, bytes] | None) -> None:
        self._broker = broker
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.will = will
        self.subscriptions: set[str] = set()
        self.bytes_sent = 0
        self.bytes_received = 0

    def deliver(self, event: Event) -> None:
        """See `Transport`; the broker calls it, too."""
        if isinstance(event, Received):
            self.bytes_received += len(event.payload)
        self._events.put(event)

    def subscribe(self, topic: str, *, qos: Literal[0, 1] = 1) -> None:  # noqa: ARG002
        """See `Transport`."""
        if topic not in self.subscriptions:
            self.subscriptions.add(topic)
            if topic.startswith("$share/"):
                self._broker.share(topic)
            else:
                self._broker.replay_retained(self, topic)

    def unsubscribe(self, topic: str) -> None:
        """See `Transport`."""
        self.subscriptions.discard(topic)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, transient: bool = False) -> None:  # noqa: ARG002
        """See `Transport`."""
        self.bytes_sent += len(payload)
        self._broker.publish(topic, payload, retain=retain)

    def together(self) -> AbstractContextManager[None]:
        """See `Transport`. Nothing waits here."""
        return contextlib.nullcontext()

    def send_blob(
        self,
        topic: str,
        blob: Blob,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        chunk_bytes: int = 0,
        resend: bool = True,  # noqa: ARG002
    ) -> None:
        """See `Transport`. Nothing waits here: there is no link to wait for."""
        size, most = blob.ref.size, min(chunk_bytes or DEFAULT_CHUNK_BYTES, DEFAULT_CHUNK_BYTES)
        for start, stop in RangeSet((low, min(high, size)) for low, high in (tuple(ranges) or ((0, size),))):
            for offset in range(start, stop, most):
                data = blob.read(offset, min(offset + most, stop))
                self.publish(topic, make_chunk(blob.ref, offset, data))

    def forget_blob(self, digest: bytes) -> None:
        """See `Transport`."""

    def receive(self, timeout: float) -> Event | None:
        """See `Transport`."""
        try:
            return self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """See `Transport`."""
        self._broker.forget(self)

"""The transport's seam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection stands, for the first time or again; subscriptions have been renewed."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection was lost. The transport tries again by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived."""

    topic: str
    payload: bytes


Event = Connected | Disconnected | Received


class Transport(Protocol):
    """At-least-once publish and subscribe.

    Messages may be lost, doubled and reordered all the same: whoever lacks something asks again.
    """

    @property
    def bytes_sent(self) -> int:
        """Payload bytes handed to the transport so far."""
        ...

    @property
    def bytes_received(self) -> int:
        """Payload bytes that have arrived so far."""
        ...

    def subscribe(self, topic: str) -> None:
        """Receives what is published to `topic`, whose levels may be "+" or end in "#".

        Returns when the broker has confirmed it, or at once while the connection is down: then it is
        renewed with the connection.
        """
        ...

    def unsubscribe(self, topic: str) -> None:
        """The opposite."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queues a message; does not wait for it to leave."""
        ...

    def receive(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds (0: only what is there now)."""
        ...

    def close(self) -> None:
        """Sends what is queued (for a bounded time), then disconnects without a last will. Idempotent."""
        ...

"""The transport's seam."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from edgetrain.protocol.blobs import Blob


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection stands, for the first time or again; subscriptions have been renewed."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection was lost. The transport tries again by itself."""

    reason: str


class Received(msgspec.Struct, frozen=True, gc=False):
    """A message arrived."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Noticed:
    """Another thread of this process has something to say, see `Transport.deliver`."""

    notice: object


Event = Connected | Disconnected | Received | Noticed


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

    def subscribe(self, topic: str, *, qos: Literal[0, 1] = 1) -> None:
        """Receives what is published to `topic`, whose levels may be "+" or end in "#".

        Returns when the broker has confirmed it, or at once while the connection is down: then it is
        renewed with the connection.

        Args:
            topic: MQTT topic filter.
            qos: 1: the broker keeps messages for us while we are away. 0: it drops them, which is right for what
                we ask for again, knowing what is missing.
        """
        ...

    def unsubscribe(self, topic: str) -> None:
        """The opposite."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, transient: bool = False) -> None:
        """Queues a message; does not wait for it to leave.

        Args:
            topic: where to.
            payload: at most 64 KiB.
            retain: the broker gives it to whoever subscribes later.
            transient: pointless after a reconnect, since the caller then says it anew: it is not sent again.
        """
        ...

    def together(self) -> AbstractContextManager[None]:
        """In its body, messages that are published may wait for each other. For the thread that receives."""
        ...

    def send_blob(
        self,
        topic: str,
        blob: Blob,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        chunk_bytes: int = 0,
        resend: bool = True,
    ) -> None:
        """Queues chunks of a blob; messages overtake them. Does not wait, and takes no memory for them.

        Bytes that wait already or are on their way to that topic are not sent twice. Chunks are no larger than
        the broker takes.

        Args:
            topic: where to.
            blob: read piece by piece from the network's thread.
            ranges: half-open byte ranges; none for all.
            chunk_bytes: most payload bytes in one chunk; 0 for as many as suit the link.
            resend: False: a lost connection drops what is queued and on the way; the receiver, who knows what
                has arrived, will ask for the rest.
        """
        ...

    def forget_blob(self, digest: bytes) -> None:
        """Drops the chunks of a blob that have not left yet."""
        ...

    def receive(self, timeout: float) -> Event | None:
        """The next event, or None after `timeout` seconds (0: only what is there now)."""
        ...

    def deliver(self, event: Event) -> None:
        """Puts an event into the queue of `receive`, from any thread: whoever waits there hears of it at once."""
        ...

    def close(self) -> None:
        """Sends what is queued (for a bounded time), then disconnects without a last will. Idempotent."""
        ...

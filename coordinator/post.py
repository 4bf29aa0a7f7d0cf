"""The coordinator's outgoing mail: every message signed, to one client or to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

from edgetrain import __version__
from edgetrain.coordinator.signing import Signing
from edgetrain.protocol.messages import Announce, BlobRef, Checkpoint, LogPoint, Message, encode_message
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal
from edgetrain.protocol.transport import Transport

COORDINATOR = "coordinator"


class Post:
    """Signs and sends.

    Args:
        transport: connected.
        topics: of the federation.
        key: the coordinator's.
        run: id of the run.
        bundle: the manifest to announce.
        serials: numbers that grow, also across restarts.
        signing: signs several at a time.
    """

    def __init__(
        self,
        transport: Transport,
        topics: Topics,
        key: SigningKey,
        *,
        run: bytes,
        bundle: BlobRef,
        serials: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        signing: Signing | None = None,
    ) -> None:
        self._signing = signing or Signing(topics.federation, COORDINATOR, key, beside=False)
        self._transport = transport
        self._topics = topics
        self._key = key
        self._run = run
        self._bundle = bundle
        self._serials = serials

    def send(self, client: str, message: Message) -> None:
        """To one client."""
        self._transport.publish(self._topics.to_client(client, "message"), self._seal(message))

    def begin(self, messages: Sequence[tuple[str, Message]]) -> Callable[[], None]:
        """Begins to sign messages to one client each; returns what sends them."""
        sealed = self._signing.seal([encode_message(message) for _, message in messages])

        def send() -> None:
            with self._transport.together():
                for (client, _), payload in zip(messages, sealed(), strict=True):
                    self._transport.publish(self._topics.to_client(client, "message"), payload)

        return send

    def broadcast(self, message: Message) -> None:
        """To everyone in the round."""
        self._transport.publish(self._topics.round, self._seal(message))

    def announce(
        self, status: Literal["open", "paused", "ended"], reason: str = "", *, client: str | None = None
    ) -> None:
        """The state of the run, to one client, or to everyone and to those who come later."""
        message = Announce(
            run=self._run,
            public_key=self._key.public_key,
            edgetrain=__version__,
            bundle=self._bundle,
            status=status,
            reason=reason[:1000],
            serial=self._serials(),
        )
        if client is None:
            self._transport.publish(self._topics.announce, self._seal(message), retain=True)
        else:
            self.send(client, message)

    def publish_checkpoints(self, points: Sequence[LogPoint]) -> None:
        """States of the audit log, oldest first, to everyone and to those who come later."""
        *earlier, newest = points
        message = Checkpoint(run=self._run, newest=newest, earlier=tuple(earlier), serial=self._serials())
        self._transport.publish(self._topics.checkpoint, self._seal(message), retain=True)

    def _seal(self, message: Message) -> bytes:
        return seal(self._key, self._topics.federation, COORDINATOR, encode_message(message))

"""Clients' signatures: those of all messages that are here, checked while others are handled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.signing import Signing
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import Envelope, verify
from edgetrain.protocol.transport import Event, Received

# Messages whose signatures are being checked: what waits for those that are right, as (public key, message).
Look = Callable[[], set[tuple[bytes, bytes]]]


class Signatures:
    """Checks them. Owned by the coordinator's thread.

    Args:
        topics: of the federation.
        roster: knows the clients' keys.
        signing: checks several at a time.
        clock: monotonic seconds.
    """

    def __init__(self, topics: Topics, roster: Roster, signing: Signing, clock: Callable[[], float]) -> None:
        self._topics = topics
        self._roster = roster
        self._signing = signing
        self._clock = clock
        # (public key, message) of those that are right.
        self._right: set[tuple[bytes, bytes]] = set()

    def look_ahead(self, events: Sequence[Event]) -> Look:
        """Begins to check the messages of known clients among events that will be handled soon; see `rely_on`."""
        now = self._clock()
        jobs = []
        for event in events:
            if not isinstance(event, Received) or not event.topic.endswith("/message"):
                continue
            sender = self._topics.sender(event.topic)
            record = self._roster.get(sender[0]) if sender else None
            if record and record.banned_until <= now:
                jobs.append((record.public_key, event.payload))
        answers = self._signing.check(jobs)
        return lambda: set(compress(jobs, answers()))

    def rely_on(self, look: Look) -> None:
        """The events of a look are handled next.

        Nothing follows from it here: who handles a message asks `check` for the key that counts then.
        """
        self._right = look()

    def check(self, envelope: Envelope, payload: bytes, public_key: bytes) -> None:
        """Checks that the owner of a key signed a message.

        Args:
            envelope: the message, unsealed.
            payload: the message.
            public_key: of its sender.

        Raises:
            SignatureError: it did not.
        """
        if (public_key, payload) not in self._right:
            verify(envelope, self._topics.federation, public_key)

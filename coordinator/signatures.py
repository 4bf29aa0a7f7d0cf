"""Clients' signatures: those of all messages that are here, checked side by side before the first is handled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.side_by_side import SideBySide
from edgetrain.protocol import MessageError, SignatureError
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import Envelope, unseal, verify
from edgetrain.protocol.transport import Event, Received


class Signatures:
    """Checks them. Owned by the coordinator's thread.

    Args:
        topics: of the federation.
        roster: knows the clients' keys.
        side_by_side: checks several at a time.
        clock: monotonic seconds.
    """

    def __init__(self, topics: Topics, roster: Roster, side_by_side: SideBySide, clock: Callable[[], float]) -> None:
        self._topics = topics
        self._roster = roster
        self._side_by_side = side_by_side
        self._clock = clock
        # (public key, message) of those that are right.
        self._right: set[tuple[bytes, bytes]] = set()

    def look_ahead(self, events: Sequence[Event]) -> None:
        """Checks the messages of known clients among events that will be handled next.

        Nothing follows from it here: who handles a message asks `check` for the key that counts then.
        """
        now = self._clock()
        jobs = []
        for event in events:
            if not isinstance(event, Received) or not event.topic.endswith("/message"):
                continue
            sender = self._topics.sender(event.topic)
            record = self._roster.get(sender[0]) if sender else None
            if record and record.banned_until <= now:
                jobs.append((record.public_key, event.payload))
        self._right = set(compress(jobs, self._side_by_side.map(self._is_right, jobs)))

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

    def _is_right(self, job: tuple[bytes, bytes]) -> bool:
        public_key, payload = job
        try:
            verify(unseal(payload), self._topics.federation, public_key)
        except (MessageError, SignatureError):
            # Who handles it will find out what is wrong with it.
            return False
        return True

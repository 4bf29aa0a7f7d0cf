"""The state machine of one round: invited -> training -> collecting -> closed. Pure: no clock, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import MappingProxyType


class Part(StrEnum):
    """How far one client is in a round."""

    INVITED = "invited"
    # It has asked for the parameters.
    TRAINING = "training"
    # It has offered an update whose chunks are on the way.
    COLLECTING = "collecting"
    ACCEPTED = "accepted"
    DECLINED = "declined"
    REFUSED = "refused"
    LOST = "lost"


OUTSTANDING = frozenset({Part.INVITED, Part.TRAINING, Part.COLLECTING})


class Outcome(Enum):
    """What is to be done with a round now."""

    OPEN = "open"
    CLOSED = "closed"
    # Too few, and nobody left to wait for: invite again.
    FAILED = "failed"


@dataclass(slots=True)
class Round:
    """One round.

    A failed round is retried with further invitations: what it has accepted stays accepted.
    """

    number: int
    # Random; updates name it.
    nonce: bytes
    # Close at once with so many accepted updates.
    goal: int
    # Close at the deadline with at least so many.
    minimum: int
    # On the caller's monotonic clock, in seconds.
    deadline_at: float
    attempt: int = 1
    # Wait so much longer for updates whose bytes are arriving at the deadline.
    grace_seconds: float = 0.0
    _parts: dict[str, Part] = field(default_factory=dict)
    # Of these, so many are in each state: asked for after every message.
    _counts: Counter[Part] = field(default_factory=Counter)

    @property
    def parts(self) -> Mapping[str, Part]:
        """How far each client is; `place` changes it."""
        return MappingProxyType(self._parts)

    def place(self, client: str, part: Part) -> None:
        """Puts a client into a state, whatever it was in before."""
        before = self._parts.get(client)
        if before is not None:
            self._counts[before] -= 1
        self._parts[client] = part
        self._counts[part] += 1

    def forget_all(self) -> None:
        """As if nobody had been invited."""
        self._parts.clear()
        self._counts.clear()

    def invite(self, client: str) -> None:
        """Adds a client; one that was accepted already stays so."""
        if self._parts.get(client) is not Part.ACCEPTED:
            self.place(client, Part.INVITED)

    def advance(self, client: str, part: Part) -> None:
        """Notes how far a client is. Accepted is final; a client that was not invited is ignored."""
        if self._parts.get(client, Part.ACCEPTED) is not Part.ACCEPTED:
            self.place(client, part)

    def count(self, *parts: Part) -> int:
        """Number of clients in any of these states."""
        return sum(self._counts[part] for part in parts)

    def waits_for(self, client: str) -> bool:
        """Whether an update of this client would count."""
        return self._parts.get(client) in OUTSTANDING

    def outcome(self, now: float) -> Outcome:
        """Whether to go on waiting, to close, or to retry."""
        accepted = self.count(Part.ACCEPTED)
        if accepted >= self.goal:
            return Outcome.CLOSED
        if now < self.deadline_at and self.count(*OUTSTANDING):
            return Outcome.OPEN
        if now < self.deadline_at + self.grace_seconds and self.count(Part.COLLECTING):
            return Outcome.OPEN
        return Outcome.CLOSED if accepted >= self.minimum else Outcome.FAILED

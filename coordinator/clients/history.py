"""What each client has done in this run so far: for selection, deadlines and bans."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from edgetrain.coordinator.run.records import ClientRow

# Durations of so many accepted updates are remembered, over all clients.
KEEP_DURATIONS = 200


@dataclass(slots=True)
class ClientHistory:
    """One client's past."""

    # Accepted updates, and the round of the last one.
    accepted: int = 0
    last_round: int = 0
    # Of its last accepted update.
    loss: float | None = None
    seconds: float = 0.0
    # Rounds that it spoiled since its last accepted update, and the round of the last of those.
    failures: int = 0
    failed_round: int = 0


@dataclass(slots=True)
class History:
    """All clients' past, by name."""

    clients: dict[str, ClientHistory] = field(default_factory=dict)
    # Seconds from the invitation to the last byte, of the latest accepted updates.
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=KEEP_DURATIONS))

    def of(self, name: str) -> ClientHistory:
        """One client's past; a fresh one for a client without."""
        return self.clients.get(name) or ClientHistory()

    def add(self, rows: Iterable[ClientRow]) -> None:
        """Takes in the rows of a closed round, or of several in order."""
        for row in rows:
            past = self.clients.setdefault(row.client, ClientHistory())
            if row.status == "accepted":
                past.accepted += 1
                past.last_round = row.round
                past.loss, past.seconds = row.loss, row.seconds
                past.failures = 0
            elif row.failed:
                past.failures += 1
                past.failed_round = row.round

"""Who hears from the foreman what becomes of updates."""

from __future__ import annotations

from typing import Protocol

from edgetrain.coordinator.rounds.open_round import Upload
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.protocol.messages import Offer


class Listener(Protocol):
    """Hears what becomes of updates."""

    def on_arrived(self, client: str, num_bytes: int) -> bool:
        """Bytes of a client have arrived at a worker; False if it is not listened to."""
        ...

    def on_malformed(self, client: str, num_bytes: int, reason: str) -> None:
        """A client has sent something that is no chunk."""
        ...

    def on_counted(self, offer: Offer, row: ClientRow) -> None:
        """An update counts, and is on the disk."""
        ...

    def on_refused(self, client: str, offer: Offer, reason: str) -> None:
        """An update does not count."""
        ...

    def ask_again(self, client: str, upload: Upload) -> None:
        """Parts of an upload are needed (again)."""
        ...

"""The roster as the run directory remembers it."""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.coordinator.clients.clients import ClientRecord, Roster
from edgetrain.coordinator.run.exports import KnownClient
from edgetrain.coordinator.run.run_directory import RunDirectory


class KnownClients:
    """The clients of the run: those of earlier processes, and whoever comes.

    Args:
        directory: of the run.
        clock: monotonic seconds.

    Raises:
        RunError: what is remembered there is damaged.
    """

    def __init__(self, directory: RunDirectory, clock: Callable[[], float]) -> None:
        self._directory = directory
        self.roster = Roster(clock)
        for name, key, last in directory.load_clients():
            self.roster.add(ClientRecord(name, key, last_accepted=last))
        self._saved = len(self.roster)

    def save(self) -> None:
        """Writes down names, keys and last accepted updates.

        Raises:
            RunError: not writable.
        """
        self._directory.save_clients(self.listed())
        self._saved = len(self.roster)

    def listed(self) -> list[KnownClient]:
        """Names, keys and last accepted updates."""
        return [(record.name, record.public_key, record.last_accepted) for record in self.roster.all()]

    def save_new(self) -> None:
        """Writes if somebody is new: a name belongs to its first key, also after a crash.

        Raises:
            RunError: not writable.
        """
        if len(self.roster) != self._saved:
            self.save()

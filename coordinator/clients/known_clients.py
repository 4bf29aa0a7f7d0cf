"""The roster as the run directory remembers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edgetrain.coordinator.clients.roster import ClientRecord, Roster
from edgetrain.coordinator.run.records import KnownClient
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
        # By name, as it is written down.
        self._saved: dict[str, KnownClient] = {}
        self.note_saved(map(_known, self.roster.all()))

    def save(self) -> None:
        """Writes down names, keys and last accepted updates, where something is new.

        Raises:
            RunError: not writable.
        """
        if changed := self.changed():
            self._directory.save_clients(changed)
            self.note_saved(changed)

    def changed(self) -> list[KnownClient]:
        """Names, keys and last accepted updates of those of whom this is not written down yet."""
        return [known for known in map(_known, self.roster.all()) if self._saved.get(known[0]) != known]

    def note_saved(self, clients: Iterable[KnownClient]) -> None:
        """They are written down."""
        self._saved.update((known[0], known) for known in clients)

    def save_new(self) -> None:
        """Writes if somebody is new: a name belongs to its first key, also after a crash.

        Raises:
            RunError: not writable.
        """
        if len(self.roster) != len(self._saved):
            self.save()


def _known(record: ClientRecord) -> KnownClient:
    return record.name, record.public_key, record.last_accepted

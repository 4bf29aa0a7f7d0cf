"""state.sqlite: the truth about what has happened in a run.

In WAL mode with `synchronous = FULL`: what a transaction has committed is on the disk (but for `note_opened`), what it
has not is as if it had never been, whenever the process or the machine ends. Errors of the disk are `OSError`, as for
the other files.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.database.migrations import migrate
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.run.records import ClientRow, KnownClient, RoundRecord

T = TypeVar("T")

FILE = "state.sqlite"

# Others who look at the file while it is written do not make us fail.
BUSY_SECONDS = 10.0
# Kinds of failure that are the disk's or somebody's fault, not a damaged file's.
_DISK = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
}


class RunDatabase:
    """The database of one run. Used by one thread at a time.

    Args:
        directory: of the run.

    Raises:
        RunError: damaged, or of a later version.
        OSError: not readable or not writable.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        with self._errors():
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._errors():
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("PRAGMA foreign_keys = ON")
                migrate(self._connection, name=str(self.path))
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Closes it; what was committed stays."""
        self._connection.close()

    # --- rounds --------------------------------------------------------------------------------------

    def records(self) -> list[RoundRecord]:
        """Of all closed rounds, in order.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        records = [
            self._decoded(row, RoundRecord) for (row,) in self._query("SELECT record FROM rounds ORDER BY round")
        ]
        if [record.round for record in records] != list(range(1, len(records) + 1)):
            raise RunError(f"{self.path}: damaged: rounds are missing; {_REMEDY}")
        return records

    def rows(self) -> Iterator[ClientRow]:
        """Of all closed rounds, in order.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        for (row,) in self._query("SELECT record FROM client_rounds ORDER BY round, position"):
            yield self._decoded(row, ClientRow)

    def close_rounds(
        self, closed: Iterable[tuple[RoundRecord, Sequence[ClientRow]]], clients: Iterable[KnownClient] = ()
    ) -> None:
        """Notes rounds with their clients, all of it or nothing. This is what makes a round count.

        Raises:
            RunError: damaged.
            OSError: not writable; nothing has changed.
        """
        with self._errors(), self._transaction():
            for record, rows in closed:
                self._connection.execute(
                    "INSERT INTO rounds (round, record) VALUES (?, ?)", (record.round, _text(record))
                )
                self._connection.executemany(
                    "INSERT INTO client_rounds (round, position, record) VALUES (?, ?, ?)",
                    [(record.round, position, _text(row)) for position, row in enumerate(rows)],
                )
                self._connection.execute("DELETE FROM opened_rounds WHERE round <= ?", (record.round,))
            self._save_clients(clients)

    def opened(self, number: int) -> RoundOpened | None:
        """How a round was opened that has not closed.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        for (data,) in self._query("SELECT opened FROM opened_rounds WHERE round = ?", number):
            try:
                return msgspec.msgpack.decode(data, type=RoundOpened)
            except msgspec.DecodeError as error:
                raise RunError(f"{self.path}: damaged: {error}; {_REMEDY}") from error
        return None

    def note_opened(self, opened: RoundOpened) -> None:
        """Notes how a round was opened. Does not wait for the disk: so says the round's journal, too.

        Raises:
            OSError: not writable.
        """
        with self._errors(), self._unsynced(), self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO opened_rounds (round, opened) VALUES (?, ?)",
                (opened.round, msgspec.msgpack.encode(opened)),
            )

    # --- evaluations and clients ---------------------------------------------------------------------

    def evaluations(self) -> list[FederatedEvaluation]:
        """In order.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        rows = self._query("SELECT record FROM evaluations ORDER BY number")
        return [self._decoded(row, FederatedEvaluation) for (row,) in rows]

    def add_evaluations(self, evaluations: Iterable[FederatedEvaluation]) -> None:
        """Appends.

        Raises:
            OSError: not writable; nothing has changed.
        """
        with self._errors(), self._transaction():
            self._connection.executemany(
                "INSERT INTO evaluations (record) VALUES (?)", [(_text(evaluation),) for evaluation in evaluations]
            )

    def clients(self) -> list[KnownClient]:
        """By name.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        rows = self._query("SELECT name, public_key, last_round, last_digest FROM clients ORDER BY name")
        return [(name, key, None if last is None else (last, digest)) for name, key, last, digest in rows]

    def save_clients(self, clients: Iterable[KnownClient]) -> None:
        """Adds clients, and notes what is new about those that are there.

        Raises:
            OSError: not writable; nothing has changed.
        """
        with self._errors(), self._transaction():
            self._save_clients(clients)

    def _save_clients(self, clients: Iterable[KnownClient]) -> None:
        self._connection.executemany(
            "INSERT INTO clients (name, public_key, last_round, last_digest) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET last_round = excluded.last_round, last_digest = excluded.last_digest",
            [(name, key, *(last or (None, None))) for name, key, last in clients],
        )

    # --- how -----------------------------------------------------------------------------------------

    def _query(self, sql: str, *values: int) -> list[Any]:
        with self._errors():
            return self._connection.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _unsynced(self) -> Iterator[None]:
        """What is committed in its body survives the end of this process, but a power cut only with what follows."""
        self._connection.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA synchronous = FULL")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # The upper bytes say more exactly what, the lowest says what kind.
            code = _DISK.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF)
            if code is not None:
                raise OSError(code, str(error), str(self.path)) from error
            raise RunError(f"{self.path}: damaged: {error}; {_REMEDY}") from error

    def _decoded(self, text: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError as error:
            raise RunError(f"{self.path}: damaged: {error}; {_REMEDY}") from error


_REMEDY = (
    "restore it from a copy, or move it (and the -wal and -shm files beside it) away: it is then made anew from "
    "rounds.jsonl, clients.csv, evaluations.jsonl and clients.json"
)


def _text(record: msgspec.Struct) -> str:
    return msgspec.json.encode(record).decode()

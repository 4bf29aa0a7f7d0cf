"""What has happened in a run: the database, which is the truth, and the text files made from it.

A round has closed when its row is in the database. The text files follow, and are put right at the next start if a
stop came between. A run directory without a database (of an earlier version, or moved away because it was damaged)
gets one from its text files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.run import exports
from edgetrain.coordinator.run.database import RunDatabase
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.run.past_run import read_rows
from edgetrain.coordinator.run.records import ClientRow, KnownClient, RoundRecord
from edgetrain.protocol.files import write_atomically

logger = logging.getLogger(__name__)


class RunLog:
    """Reads it at the start, adds to it later.

    Args:
        path: the run directory.

    Raises:
        RunError: damaged.
        OSError: not readable or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = RunDatabase(path)
        try:
            if not self._database.records():
                self._take_over_text_files()
            self.records = self._database.records()
            self.evaluations = self._database.evaluations()
            self._put_right("rounds.jsonl", exports.lines(self.records))
            self._put_right("evaluations.jsonl", exports.lines(self.evaluations))
            self._export_clients()
            self._put_right("clients.csv", exports.table(self._database.rows(), header=bool(self.records)))
        except BaseException:
            self._database.close()
            raise

    def close_round(
        self, record: RoundRecord, rows: Sequence[ClientRow], clients: Sequence[KnownClient] | None = None
    ) -> None:
        """Makes the round count; in the same breath notes what is new about clients.

        Raises:
            RunError: damaged.
            OSError: not writable.
        """
        self._database.close_rounds([(record, rows)], clients or ())
        self.records.append(record)
        if clients:
            self._export_clients()
        self._append("clients.csv", exports.table(rows, header=len(self.records) == 1))
        self._append("rounds.jsonl", exports.lines([record]))

    def opened(self, number: int) -> RoundOpened | None:
        """How a round was opened that has not closed.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        return self._database.opened(number)

    def note_opened(self, opened: RoundOpened) -> None:
        """Notes how a round was opened.

        Raises:
            OSError: not writable.
        """
        self._database.note_opened(opened)

    def add_evaluation(self, evaluation: FederatedEvaluation) -> None:
        """Notes an evaluation by the clients.

        Raises:
            OSError: not writable.
        """
        self._database.add_evaluations([evaluation])
        self.evaluations.append(evaluation)
        self._append("evaluations.jsonl", exports.lines([evaluation]))

    def clients(self) -> list[KnownClient]:
        """Every client seen in this run.

        Raises:
            RunError: damaged.
            OSError: not readable.
        """
        return self._database.clients()

    def save_clients(self, clients: Sequence[KnownClient]) -> None:
        """Notes clients.

        Raises:
            OSError: not writable.
        """
        self._database.save_clients(clients)
        self._export_clients()

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def _take_over_text_files(self) -> None:
        records = exports.read_round_lines(self.path / "rounds.jsonl")
        evaluations = exports.read_lines(self.path / "evaluations.jsonl", FederatedEvaluation)
        if not self._database.clients() and (clients := exports.read_client_list(self.path / "clients.json")):
            self._database.save_clients(clients)
        if not records:
            return
        listed = read_rows(self.path / "clients.csv")
        rows = {number: list(group) for number, group in groupby(listed, lambda row: row.round)}
        logger.warning("%s: no database: making one from the text files, %d rounds", self.path, len(records))
        self._database.add_evaluations(evaluations)
        self._database.close_rounds((record, rows.get(record.round, [])) for record in records)

    def _export_clients(self) -> None:
        write_atomically(self.path / "clients.json", exports.client_list(self._database.clients()), durable=False)

    def _put_right(self, name: str, data: bytes) -> None:
        path = self.path / name
        if (path.read_bytes() if path.exists() else b"") != data:
            write_atomically(path, data)

    def _append(self, name: str, data: bytes) -> None:
        with (self.path / name).open("ab") as file:
            file.write(data)

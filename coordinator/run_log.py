"""The logs in a run directory: one line per closed round, per client and round, per evaluation.

rounds.jsonl        one line per closed round: the commit record
evaluations.jsonl   the clients' own evaluations
clients.csv         one line per client and round
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import msgspec

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.records import ClientRow, RoundRecord
from edgetrain.coordinator.spread import FederatedEvaluation
from edgetrain.protocol.files import sync_directory, write_atomically


class RunLog:
    """Reads them at the start, appends to them later.

    Args:
        path: the run directory.

    Raises:
        RunError: damaged.
        OSError: not readable or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = self._load_records()
        self.evaluations = self._load_evaluations()
        self._trim_rows()

    def close_round(self, record: RoundRecord, rows: list[ClientRow]) -> None:
        """Writes the rows, then the line that makes the round count.

        Raises:
            OSError: not writable.
        """
        self._append_rows(rows)
        self._append("rounds.jsonl", msgspec.json.encode(record) + b"\n")
        self.records.append(record)

    def add_evaluation(self, evaluation: FederatedEvaluation) -> None:
        """Appends to evaluations.jsonl.

        Raises:
            OSError: not writable.
        """
        self._append("evaluations.jsonl", msgspec.json.encode(evaluation) + b"\n")
        self.evaluations.append(evaluation)

    def _load_records(self) -> list[RoundRecord]:
        path = self.path / "rounds.jsonl"
        data = path.read_bytes() if path.exists() else b""
        records, good = [], 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(msgspec.json.decode(line, type=RoundRecord))
            except msgspec.DecodeError as error:
                raise RunError(f"{path}: line {len(records) + 1} is damaged: {error}") from error
            if records[-1].round != len(records):
                raise RunError(f"{path}: line {len(records)} is of round {records[-1].round}; restore the file")
            good += len(line)
        if good < len(data):
            # A power cut tore the last line: that round did not close, and its journal is still there.
            write_atomically(path, data[:good])
        return records

    def _load_evaluations(self) -> list[FederatedEvaluation]:
        path = self.path / "evaluations.jsonl"
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_atomically(path, whole)
        try:
            return [msgspec.json.decode(line, type=FederatedEvaluation) for line in whole.splitlines()]
        except msgspec.DecodeError as error:
            raise RunError(f"{path}: damaged: {error}") from error

    def _trim_rows(self) -> None:
        """Drops rows of a round that did not close: they will be written again."""
        path = self.path / "clients.csv"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        closed = [
            line
            for line in lines
            if line.endswith(b"\n")
            and not ((number := line.partition(b",")[0]).isdigit() and int(number) > len(self.records))
        ]
        if closed != lines:
            write_atomically(path, b"".join(closed))

    def _append_rows(self, rows: list[ClientRow]) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ClientRow.__struct_fields__, lineterminator="\n")
        path = self.path / "clients.csv"
        if not path.exists() or not path.stat().st_size:
            writer.writeheader()
        writer.writerows(msgspec.to_builtins(rows))
        self._append("clients.csv", buffer.getvalue().encode())

    def _append(self, name: str, data: bytes) -> None:
        path = self.path / name
        fresh = not path.exists()
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync_directory(self.path)

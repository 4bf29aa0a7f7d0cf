"""A run directory as read by others than its coordinator: nothing is locked or changed."""

from __future__ import annotations

import csv
import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.records import ClientRow, RoundRecord, Summary
from edgetrain.coordinator.run.requests import read_request
from edgetrain.coordinator.stopping import best_round, metric_series
from edgetrain.protocol.config import convert, read_toml

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PastRun:
    """What a run has left so far."""

    path: Path
    config: FederationConfig
    records: list[RoundRecord]
    evaluations: list[FederatedEvaluation]
    rows: list[ClientRow]
    summary: Summary | None
    is_running: bool

    @classmethod
    def open(cls, path: Path) -> PastRun:
        """Reads a run directory.

        Raises:
            RunError: it is none, or damaged.
            ConfigError: its settings are of another version.
        """
        if not (path / "run.json").is_file():
            raise RunError(f"{path}: holds no run")
        config = convert(read_toml(path / "config.toml"), FederationConfig, where=str(path / "config.toml"))
        try:
            summary = path / "summary.json"
            return cls(
                path=path,
                config=config,
                records=_lines(path / "rounds.jsonl", RoundRecord),
                evaluations=_lines(path / "evaluations.jsonl", FederatedEvaluation),
                rows=read_rows(path / "clients.csv"),
                summary=msgspec.json.decode(summary.read_bytes(), type=Summary) if summary.exists() else None,
                is_running=_is_locked(path / "lock"),
            )
        except (OSError, msgspec.DecodeError) as error:
            raise RunError(f"{path}: damaged: {error}") from error

    @property
    def strategy(self) -> str:
        """The strategy's stack, e.g. "fedadam(median)"."""
        return _described(self.config.strategy)

    @property
    def status(self) -> str:
        """What it is doing, or how it ended."""
        if self.is_running:
            return {"run": "running", "pause": "paused", "stop": "stopping"}[read_request(self.path)]
        return self.summary.status if self.summary else "interrupted"

    @property
    def best_round(self) -> int | None:
        """The best round by the [stop] metric, or by loss while that has not been measured."""
        for metric in (self.config.stop.metric, "loss"):
            series = metric_series(metric, self.records, self.evaluations)
            if (best := best_round(metric, self.records, series)) is not None:
                return best
        return None


def find_runs(directory: Path) -> list[PastRun]:
    """All runs in a directory and below, by path; those that cannot be read are left out."""
    runs = []
    for info in sorted(directory.rglob("run.json")):
        try:
            runs.append(PastRun.open(info.parent))
        except RunError:
            continue
    return runs


def read_rows(path: Path) -> list[ClientRow]:
    """clients.csv; a last line that a power cut has torn does not count.

    Raises:
        RunError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in file if line.endswith("\n")]
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(lines)]
        return msgspec.convert(rows, list[ClientRow], strict=False)
    except (OSError, msgspec.ValidationError, csv.Error) as error:
        raise RunError(f"{path}: damaged: {error}") from error


def _lines(path: Path, kind: type[T]) -> list[T]:
    data = path.read_bytes() if path.exists() else b""
    return [msgspec.json.decode(line, type=kind) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def _described(table: object) -> str:
    if not isinstance(table, dict):
        return str(table)
    inner = table.get("inner")
    return f"{table.get('name')}({_described(inner)})" if inner else str(table.get("name"))


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

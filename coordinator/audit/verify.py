"""Checking an audit log: that it is, byte for byte, what its coordinator wrote, and all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgetrain.coordinator.audit.chain import (
    HEAD_FILE,
    LOG_FILE,
    AuditError,
    genesis,
    is_sealed,
    read_head,
    read_lines,
)
from edgetrain.coordinator.audit.records import Opened


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a good log holds."""

    run: str
    federation: str
    public_key: bytes
    # Lines, seals included.
    records: int
    kinds: Counter[str]
    # Checkpoints of others that were found again in it.
    compared: int


def verify_audit(
    directory: Path, *, public_key: bytes | None = None, seen: Mapping[int, bytes] | None = None
) -> AuditReport:
    """Checks a run's audit log.

    Args:
        directory: of the run.
        public_key: the coordinator's. None takes the one that the log names: then somebody who rewrites all of
            it with a key of their own is not found out.
        seen: hashes that others have seen, by number of records.

    Raises:
        AuditError: edited, cut, damaged, unsealed at its end, or other than what others have seen.
        OSError: cannot be read.
    """
    path = directory / LOG_FILE
    if not path.exists():
        raise AuditError(f"{directory}: holds no {LOG_FILE}")
    try:
        return _verify(directory, public_key, dict(seen or {}))
    except AuditError as error:
        raise AuditError(f"{path}: {error}") from error


def _verify(directory: Path, public_key: bytes | None, seen: dict[int, bytes]) -> AuditReport:
    opened = _opened(directory / LOG_FILE)
    run = bytes.fromhex(opened.run)
    key = public_key or bytes.fromhex(opened.public_key)
    if key.hex() != opened.public_key:
        raise AuditError(f"is sealed by key {opened.public_key[:16]}…, not by {key.hex()[:16]}…")
    try:
        head = read_head(directory, run, key)
    except FileNotFoundError as error:
        raise AuditError(f"{HEAD_FILE} is missing: lines may have been cut off") from error
    except AuditError as error:
        raise AuditError(f"{HEAD_FILE} {error}") from error
    kinds: Counter[str] = Counter()
    before = previous = genesis(run)
    line, compared, at_head = None, 0, False
    with (directory / LOG_FILE).open("rb") as file:
        for line in read_lines(file, run):
            kinds[line.type] += 1
            before, previous = previous, line.hash
            records = line.n + 1
            if records == head.records:
                at_head = line.hash == head.hash
            if records in seen:
                if seen[records] != line.hash:
                    raise AuditError(f"at line {records} it is another log than the one that a client has seen")
                compared += 1
    assert line is not None, "it holds at least its first record"
    if not at_head:
        raise AuditError(f"ends at line {line.n + 1}, but {head.records} lines were sealed: it was cut or rewritten")
    if line.type != "seal" or not is_sealed(line, before, run, key):
        raise AuditError(
            f"the lines after line {head.records} are not sealed: the coordinator was killed while it wrote them (its "
            "next start cuts them off and says so), or somebody else has added them"
        )
    if missing := [records for records in seen if records > line.n + 1]:
        raise AuditError(f"ends at line {line.n + 1}, but a client has seen {max(missing)} lines: it was cut off")
    return AuditReport(opened.run, opened.federation, key, line.n + 1, kinds, compared)


def _opened(path: Path) -> Opened:
    with path.open("rb") as file:
        first = file.readline(1 << 16)
    try:
        opened = msgspec.json.decode(first, type=Opened)
        if len(bytes.fromhex(opened.run)) != 16 or len(bytes.fromhex(opened.public_key)) != 32:
            raise ValueError("ids of another length")
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise AuditError(f"line 1 is not the one that opens a log: {error}") from error
    return opened


def records_of(directory: Path, client: str | None = None) -> Iterator[dict[str, Any]]:
    """The records but for seals, unverified, of all or of one client.

    Raises:
        AuditError: a line that is no record.
    """
    with (directory / LOG_FILE).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise AuditError(f"{directory / LOG_FILE}: line {number} is no record: {error}") from error
            if not isinstance(record, dict):
                raise AuditError(f"{directory / LOG_FILE}: line {number} is no record")
            if record.get("type") != "seal" and (client is None or record.get("client") == client):
                yield record


__all__ = ["AuditError", "AuditReport", "records_of", "verify_audit"]

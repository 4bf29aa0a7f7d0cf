"""What people read of a run: text files made from its database, and taken for it if that is not there.

rounds.jsonl        one line per closed round
evaluations.jsonl   the clients' own evaluations
clients.csv         one line per client and round
clients.json        names, keys and last accepted updates
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.records import ClientRow, KnownClient, RoundRecord

T = TypeVar("T")


class _PinnedClient(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    public_key: str
    last_round: int | None = None
    last_digest: str | None = None


def lines(records: Iterable[msgspec.Struct]) -> bytes:
    """JSON, one line each."""
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)


def table(rows: Iterable[ClientRow], *, header: bool) -> bytes:
    """CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ClientRow.__struct_fields__, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(msgspec.to_builtins(row) for row in rows)
    return buffer.getvalue().encode()


def client_list(clients: Iterable[KnownClient]) -> bytes:
    """clients.json."""
    pinned = [
        _PinnedClient(
            name=name,
            public_key=key.hex(),
            last_round=last[0] if last else None,
            last_digest=last[1].hex() if last else None,
        )
        for name, key, last in clients
    ]
    return msgspec.json.format(msgspec.json.encode(pinned), indent=1)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """What `lines` wrote; a last line that a power cut has torn does not count.

    Raises:
        RunError: damaged.
        OSError: not readable.
    """
    data = path.read_bytes() if path.exists() else b""
    records: list[T] = []
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError as error:
            raise RunError(f"{path}: line {len(records) + 1} is damaged: {error}") from error
    return records


def read_round_lines(path: Path) -> list[RoundRecord]:
    """rounds.jsonl: every round once, in order.

    Raises:
        RunError: damaged.
        OSError: not readable.
    """
    records = read_lines(path, RoundRecord)
    for number, record in enumerate(records, 1):
        if record.round != number:
            raise RunError(f"{path}: line {number} is of round {record.round}; restore the file")
    return records


def read_client_list(path: Path) -> list[KnownClient]:
    """What `client_list` wrote.

    Raises:
        RunError: damaged.
        OSError: not readable.
    """
    if not path.exists():
        return []
    try:
        return [
            (
                entry.name,
                bytes.fromhex(entry.public_key),
                None if entry.last_round is None else (entry.last_round, bytes.fromhex(entry.last_digest or "")),
            )
            for entry in msgspec.json.decode(path.read_bytes(), type=list[_PinnedClient])
        ]
    except (msgspec.DecodeError, ValueError) as error:
        raise RunError(f"{path}: damaged: {error}") from error

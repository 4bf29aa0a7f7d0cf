"""Checkpoints of the coordinator's audit log, as clients remember them.

A log that is rewritten must contradict somebody's memory: every checkpoint says how long the log was and what its
chain hash was, the newest message repeats those before it without a gap, and serials grow. So whoever remembers one
checkpoint notices when a later message leaves it out, or has another hash there, or a shorter log.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.messages import Checkpoint

FILE = "checkpoints.jsonl"
# Of all runs; the oldest go first.
KEEP = 1000
MAX_FILE_BYTES = 1 << 20


class SeenCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One line of checkpoints.jsonl."""

    run: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    records: Annotated[int, Meta(ge=0, le=2**53)]
    head: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    # Of the message it came with.
    serial: Annotated[int, Meta(ge=0, le=2**53)]

    @property
    def head_bytes(self) -> bytes:
        """The chain hash."""
        return bytes.fromhex(self.head)


def contradiction(seen: Sequence[SeenCheckpoint], message: Checkpoint) -> str | None:
    """Why a checkpoint cannot be of the log that was seen before; None if it can.

    Args:
        seen: of the message's run.
        message: signed by the coordinator.
    """
    told = {point.records: point.head for point in (*message.earlier, message.newest)}
    if len(told) < len(message.earlier) + 1:
        return "the coordinator names one length of its audit log twice"
    oldest = min(told)
    for before in seen:
        if before.serial > message.serial:
            continue
        if before.records > message.newest.records:
            return f"the audit log had {before.records} lines and now has {message.newest.records}"
        if before.records in told and told[before.records] != before.head_bytes:
            return f"line {before.records} of the audit log is another one than it was"
        if before.records > oldest and before.records not in told:
            return f"the checkpoint at line {before.records} of the audit log is not in its history any more"
    return None


class CheckpointMemory:
    """What one client has been told, in its state directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._seen = read_seen(self._path)

    def take(self, message: Checkpoint) -> str | None:
        """Compares and remembers; the reason why the history was rewritten, or None.

        Raises:
            OSError: it cannot be kept.
        """
        run = message.run.hex()
        of_run = [point for point in self._seen if point.run == run]
        reason = contradiction(of_run, message)
        newest = message.newest
        if reason is None and all(point.records != newest.records for point in of_run):
            self._seen.append(
                SeenCheckpoint(run=run, records=newest.records, head=newest.head.hex(), serial=message.serial)
            )
            self._seen = self._seen[-KEEP:]
            write_atomically(self._path, b"".join(msgspec.json.encode(point) + b"\n" for point in self._seen))
        return reason


def read_seen(path: Path) -> list[SeenCheckpoint]:
    """The lines of a checkpoints.jsonl; what is no such line is left out."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except OSError:
        return []
    seen = []
    for line in data.splitlines():
        try:
            seen.append(msgspec.json.decode(line, type=SeenCheckpoint))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return seen

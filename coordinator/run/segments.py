"""Segments: a round's journal in parts, where several processes accept its updates (`coordinator.workers`).

journal/round-00001/worker-0000.journal      as any journal, with the first record and the salt of the round's own
journal/round-00001/worker-0000.lock         locked by whoever reads or writes the segment
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.journal import RoundOpened, UpdateAccepted
from edgetrain.coordinator.run.journal_reading import JournalReader

# A process that was killed lets go of its segment at once; one that ends in order, after what it is at.
LOCK_SECONDS = 10.0


def segment_path(journal: Path, worker: int) -> Path:
    """A worker's segment of a round's journal."""
    return journal.with_suffix("") / f"worker-{worker:04d}.journal"


def segments_of(journal: Path) -> dict[int, Path]:
    """The segments that there are of a round's journal, by worker."""
    found = {}
    for path in sorted(journal.with_suffix("").glob("worker-*.journal")):
        if number := re.fullmatch(r"worker-(\d+)\.journal", path.name):
            found[int(number[1])] = path
    return found


def lock_segment(path: Path) -> BinaryIO:
    """Keeps others from a segment until the returned file is closed.

    Raises:
        RunError: another process has it and does not let go.
        OSError: not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".lock").open("wb")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                file.close()
                raise RunError(f"{path}: another process still writes to it; end it") from error
            time.sleep(0.01)
        except BaseException:
            file.close()
            raise
        else:
            return file


def read_segment(path: Path, opened: RoundOpened) -> Iterator[tuple[UpdateAccepted, bytes]]:
    """The updates in a segment that nobody writes to, once each; they are on the disk then.

    Raises:
        RunError: it is of another round, or cannot be read.
    """
    seen = set()
    try:
        if not path.exists():
            return
        with lock_segment(path), path.open("rb") as file:
            # Its writer may have ended before it did this.
            os.fsync(file.fileno())
            for meta, payload in JournalReader(path, opened):
                if isinstance(meta, RoundOpened) and (meta.run, meta.round) != (opened.run, opened.round):
                    raise RunError(f"{path}: is not of this run's round {opened.round}; move it away")
                if isinstance(meta, UpdateAccepted) and meta.client not in seen:
                    seen.add(meta.client)
                    yield meta, payload
    except OSError as error:
        raise RunError(f"{path}: cannot read the journal: {error}") from error

"""Writing the audit log: batches of lines, each closed by a seal, on disk before anybody hears of what they say."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgetrain.coordinator.audit.chain import (
    HEAD_FILE,
    LOG_FILE,
    MAX_LINE_BYTES,
    AuditError,
    Head,
    chained,
    encode_head,
    genesis,
    is_sealed,
    read_head,
    read_lines,
    seal_signature,
)
from edgetrain.coordinator.audit.records import AuditRecord, Checkpoint, Opened, Recovered
from edgetrain.coordinator.beside import Beside
from edgetrain.coordinator.errors import RunError
from edgetrain.protocol.files import sync_directory
from edgetrain.protocol.signing import SigningKey

logger = logging.getLogger(__name__)

# Checkpoints that go out with the newest one, so that a client that was away can compare what it remembers.
KEEP_CHECKPOINTS = 64


class _Line(msgspec.Struct, frozen=True, gc=False):
    """A line that is not on the disk yet."""

    text: bytes
    # The log's, with this line.
    head: Head
    # A checkpoint's.
    point: Head | None = None
    seal: bool = False


@dataclass(frozen=True, slots=True)
class _State:
    """What is on the disk, and what is not. Replaced as a whole: between any two instructions it is right."""

    # Bytes of the file up to and with the last seal.
    length: int
    sealed: Head
    checkpoints: tuple[Head, ...] = ()
    pending: list[_Line] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Writing:
    """What another thread writes, its seal included."""

    state: _State
    # Lines of `state.pending`, and their bytes.
    count: int
    length: int
    end: Beside[None]


class AuditLog:
    """A run's audit log, open for appending.

    Args:
        directory: of the run.
        key: the coordinator's; it seals the log from the first line to the last.
        opened: the first record, if there is no log yet.
        clock: wall time in seconds.

    Raises:
        RunError: the log was edited, or belongs to another key, or cannot be written.
    """

    def __init__(
        self, directory: Path, *, key: SigningKey, opened: Opened, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = directory / LOG_FILE
        self._head_path = directory / HEAD_FILE
        self._key = key
        self._run = bytes.fromhex(opened.run)
        self._clock = clock
        self._state = _State(0, Head(0, genesis(self._run)))
        self._writing: _Writing | None = None
        try:
            fresh = not self.path.exists()
            if fresh and self._head_path.exists():
                raise RunError(
                    f"{self.path} is gone, but {self._head_path.name} says that there was one; restore it from a copy"
                )
            recovered = None if fresh else self._recover()
            self._file = self.path.open("xb" if fresh else "r+b", buffering=0)
            if fresh:
                sync_directory(directory)
        except OSError as error:
            raise RunError(f"{self.path}: cannot open the audit log: {error}") from error
        if self.sealed.records == 0:
            self.append(opened)
        if recovered:
            self.append(recovered)

    @property
    def sealed(self) -> Head:
        """What `commit` has sealed; the log ends there."""
        return self._state.sealed

    @property
    def checkpoints(self) -> Sequence[Head]:
        """The last that were made and are on the disk, oldest first."""
        return self._state.checkpoints

    def append(self, record: AuditRecord, *, point: Head | None = None) -> None:
        """Adds a record; it counts after the next `commit`, which comes before any verdict goes out.

        Args:
            record: what happened.
            point: what a checkpoint says, for `checkpoints`.

        Raises:
            ValueError: larger than a line may be; data does not belong here.
        """
        state = self._state
        last = state.pending[-1].head if state.pending else state.sealed
        second, milliseconds = divmod(int(self._clock() * 1000), 1000)
        at = f'{{"n":{last.records},"at":"{_second(second)}.{milliseconds:03d}Z",'
        line, digest = chained(last.hash, at.encode() + msgspec.json.encode(record)[1:])
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"an audit record of {len(line)} bytes; at most {MAX_LINE_BYTES} are allowed")
        state.pending.append(_Line(line, Head(last.records + 1, digest), point))

    def commit(self) -> None:
        """Seals what was appended and returns when it is on the disk. Without anything appended it does nothing.

        Raises:
            RunError: the disk did not take it.
        """
        self.begin_commit()
        self.end_commit()

    def begin_commit(self) -> None:
        """Seals what was appended; another thread writes it, until `end_commit`. More can be appended meanwhile.

        Raises:
            RunError: the disk did not take what was sealed before.
        """
        self.end_commit()
        state = self._state
        if not state.pending:
            return
        # After a failure the last line may be a seal already.
        if not state.pending[-1].seal:
            last = state.pending[-1].head
            seal = {"n": last.records, "type": "seal", "signature": seal_signature(self._key, self._run, last)}
            line, digest = chained(last.hash, msgspec.json.encode(seal))
            state.pending.append(_Line(line, Head(last.records + 1, digest), seal=True))
        data = b"".join([line.text for line in state.pending])
        head = encode_head(self._key, self._run, state.pending[-1].head)
        end = Beside(lambda: self._write(data, state.length, head))
        self._writing = _Writing(state, len(state.pending), len(data), end)

    def end_commit(self) -> None:
        """Returns when what `begin_commit` has sealed is on the disk.

        Raises:
            RunError: the disk did not take it.
        """
        writing = self._writing
        if writing is None:
            return
        # Whoever is interrupted here may come again.
        writing.end.join()
        try:
            writing.end.result()
        except BaseException as error:
            # A later commit writes it, to the same place.
            self._writing = None
            if isinstance(error, OSError):
                raise RunError(f"{self.path}: cannot write the audit log: {error}") from error
            raise
        if self._state is writing.state:
            self._state = _after(writing)
        self._writing = None

    def note_checkpoint(self) -> Head:
        """Notes the state of the log as one that clients are told, after the next `commit`.

        Raises:
            RunError: the disk did not take what is in it.
        """
        self.commit()
        point = self.sealed
        self.append(Checkpoint(records=point.records, head=point.hash.hex()), point=point)
        return point

    def close(self) -> None:
        """Commits and closes the file. Idempotent.

        Raises:
            RunError: the disk did not take it.
        """
        if self._file.closed:
            return
        try:
            self.commit()
        finally:
            self._file.close()

    def _write(self, data: bytes, start: int, head: bytes) -> None:
        """In another thread: sealed lines, then the head file that says so."""
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), memoryview(data)[written:], start + written)
            os.fsync(self._file.fileno())
            self._write_head(head)
        except BaseException:
            self._file.truncate(start)
            raise

    def _write_head(self, data: bytes) -> None:
        """In place: what is shorter than a disk's sector is the old or the new. The log is synced, so old is fine."""
        try:
            descriptor, fresh = os.open(self._head_path, os.O_WRONLY), False
        except FileNotFoundError:
            descriptor, fresh = os.open(self._head_path, os.O_WRONLY | os.O_CREAT, 0o644), True
        try:
            os.pwrite(descriptor, data, 0)
            if fresh:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if fresh:
            sync_directory(self._head_path.parent)

    def _recover(self) -> Recovered | None:
        """Reads the log there is, and cuts what a crash has left after the last seal."""
        try:
            head: Head | None = read_head(self.path.parent, self._run, self._key.public_key)
        except (AuditError, FileNotFoundError) as error:
            head = None
            logger.warning("%s: missing or damaged (%s); the log says so from here on", self._head_path, error)
        state, problem = self.sealed, ""
        sealed, length = state, 0
        points: list[Head] = []
        seen: Head | None = None
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                for line in read_lines(file, self._run):
                    if line.type == "seal" and is_sealed(line, state.hash, self._run, self._key.public_key):
                        sealed, length = Head(line.n + 1, line.hash), line.end
                    elif line.type == "checkpoint":
                        points.append(_checkpoint(line.text))
                    state = Head(line.n + 1, line.hash)
                    if head and state.records == head.records:
                        seen = state
            except AuditError as error:
                problem = str(error)
        if head and (seen != head or sealed.records < head.records):
            raise RunError(
                f"{self.path}: was changed after it was written: "
                f"{problem or f'it ends at line {state.records}, or is another, where line {head.records} was sealed'}"
                f"; or it was sealed by another key. Restore it (and the key) from a copy, or choose another `out`."
            )
        if not head and state.records and not sealed.records:
            raise RunError(f"{self.path}: no line of it was sealed by this coordinator's key; restore it from a copy")
        self._state = _State(length, sealed, tuple(points[-KEEP_CHECKPOINTS:]))
        cut = size - length
        if not cut and head:
            return None
        digest = ""
        if cut:
            with self.path.open("r+b") as file:
                file.seek(length)
                digest = hashlib.sha256(file.read()).hexdigest()
                file.truncate(length)
                os.fsync(file.fileno())
            logger.warning("%s: cut %d bytes after the last seal, which a crash has left", self.path, cut)
        return Recovered(cut_bytes=cut, cut_sha256=digest, head_lost=head is None)


def _after(writing: _Writing) -> _State:
    """The state once the disk has it."""
    state = writing.state
    written, rest = state.pending[: writing.count], state.pending[writing.count :]
    # On disk before anybody hears of them: the next process repeats them.
    points = (*state.checkpoints, *(line.point for line in written if line.point))
    return _State(state.length + writing.length, written[-1].head, points[-KEEP_CHECKPOINTS:], rest)


def _checkpoint(text: bytes) -> Head:
    try:
        checkpoint = msgspec.json.decode(text, type=Checkpoint)
        return Head(checkpoint.records, bytes.fromhex(checkpoint.head))
    except (msgspec.DecodeError, ValueError) as error:
        raise AuditError(f"a checkpoint that is none: {error}") from error


@functools.lru_cache(maxsize=4)
def _second(second: int) -> str:
    """ISO 8601, of a second since 1970: many records are of the same."""
    return dt.datetime.fromtimestamp(second, dt.UTC).isoformat().removesuffix("+00:00")

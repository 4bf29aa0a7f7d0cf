"""The append-only journal of a round: every accepted update is on disk before its sender hears so.

A file per round. Each record, little-endian:

    "EJ" | version 1 | reserved 0 | length of meta, u32 | length of payload, u64 | CRC-32, u32 | meta, msgpack | payload

The CRC is of meta + payload, in the first record; in the others of salt + meta + payload, where the salt is in the
first record and nobody else knows it: so that nothing a client sends can be taken for a record when a damaged journal
is searched for whole ones (`journal_reading`).
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from pathlib import Path

import msgspec

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.secure.records import SecureRecord
from edgetrain.protocol.files import begin_writing, sync_directory
from edgetrain.protocol.training import TrainingConfig

HEADER = struct.Struct("<2sBBIQI")
MAGIC, VERSION = b"EJ", 1
# So many bytes are kept here before they are written, and the disk may begin: a call for each record would cost a fifth
# of the time that an update of 12 kB takes.
_HELD_BYTES = 1 << 20


class RoundOpened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """First record: which round this is."""

    run: bytes
    round: int
    nonce: bytes
    # SHA-256 of the vector that clients start from.
    parameters: bytes
    # Random; goes into the later records' checksums.
    salt: bytes = b""


class Invited(msgspec.Struct, frozen=True, kw_only=True, tag="invited"):
    """Who has got a plan: after a restart, their updates are still welcome."""

    clients: tuple[str, ...]


class UpdateAccepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """An update; the payload holds its bytes."""

    client: str
    # The client's signed offer as it came, for audits.
    envelope: bytes
    # How the client was told to train.
    training: TrainingConfig = TrainingConfig()


Meta = RoundOpened | Invited | UpdateAccepted | SecureRecord

_encode = msgspec.msgpack.Encoder().encode


class Journal:
    """The journal of one round, open for appending.

    Args:
        path: the file; made if it is not there.
        length: of what is whole in it; the rest is cut off.
        salt: of its first record.

    Raises:
        RunError: cannot be opened.
    """

    def __init__(self, path: Path, *, length: int = 0, salt: bytes = b"") -> None:
        self.path = path
        self._length = length
        self._salt = salt
        # Records that are not in the file yet.
        self._held: list[bytes | memoryview] = []
        self._held_bytes = 0
        # One thread may append while another commits.
        self._lock = threading.Lock()
        try:
            self._fresh = not path.exists()
            self._file = path.open("ab", buffering=0)
            if path.stat().st_size > length:
                self._file.truncate(length)
        except OSError as error:
            raise RunError(f"{path}: cannot open the journal: {error}") from error

    def append(self, meta: Meta, payload: bytes | memoryview = b"") -> None:
        """Adds a record; it counts only after `commit`. The payload must not change any more.

        Raises:
            RunError: as `commit`.
        """
        encoded = _encode(meta)
        salt = b"" if isinstance(meta, RoundOpened) else self._salt
        header = HEADER.pack(MAGIC, VERSION, 0, len(encoded), len(payload), checksum(salt, encoded, payload))
        with self._lock:
            self._held += (header, encoded, payload)
            self._held_bytes += len(header) + len(encoded) + len(payload)
            if self._held_bytes >= _HELD_BYTES:
                start = self._length
                self._write()
                begin_writing(self._file.fileno(), start, self._length)

    def flush(self) -> None:
        """Hands all records to the system: they survive this process now, but not a power cut.

        Raises:
            RunError: as `commit`.
        """
        with self._lock:
            self._write()

    def commit(self) -> None:
        """Returns when all records are on the disk.

        Raises:
            RunError: disk full or read-only. The file is as before; a later commit writes what this one could not.
        """
        self.flush()
        try:
            os.fsync(self._file.fileno())
            if self._fresh:
                sync_directory(self.path.parent)
                self._fresh = False
        except OSError as error:
            raise RunError(f"{self.path}: cannot sync the journal: {error}") from error

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if not self._file.closed:
            # Nobody relies on what was not committed.
            with contextlib.suppress(RunError):
                self.flush()
            self._file.close()

    def _write(self) -> None:
        data = memoryview(b"".join(self._held))
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._file.truncate(self._length)
            raise RunError(f"{self.path}: cannot write to the journal: {error}") from error
        self._length += len(data)
        self._held.clear()
        self._held_bytes = 0


def checksum(salt: bytes, meta: bytes, payload: bytes | memoryview) -> int:
    """CRC-32 of a record."""
    return zlib.crc32(payload, zlib.crc32(meta, zlib.crc32(salt)))

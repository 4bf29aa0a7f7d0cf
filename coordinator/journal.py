"""The append-only journal of a round: every accepted update is on disk before its sender hears so.

A file per round. Each record, little-endian:

    "EJ" | version 1 | reserved 0 | length of meta, u32 | length of payload, u64 | CRC-32 of meta + payload, u32
    | meta, msgpack | payload

The first record opens the round. What follows a torn or damaged record was never acknowledged and is cut off.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.secure_records import SecureRecord
from edgetrain.protocol.files import sync_directory
from edgetrain.protocol.training import TrainingConfig

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<2sBBIQI")
_MAGIC, _VERSION = b"EJ", 1


class RoundOpened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """First record: which round this is."""

    run: bytes
    round: int
    nonce: bytes
    # SHA-256 of the vector that clients start from.
    parameters: bytes


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


class Journal:
    """The journal of one round, open for appending.

    Args:
        path: the file; made if it is not there, cut to its last whole record if it is.

    Raises:
        RunError: cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            fresh = not path.exists()
            good = 0 if fresh else _good_length(path)
            self._file = path.open("ab", buffering=0)
            if not fresh and path.stat().st_size > good:
                logger.warning("%s: cutting %d bytes of a torn record", path, path.stat().st_size - good)
                self._file.truncate(good)
            if fresh:
                sync_directory(path.parent)
        except OSError as error:
            raise RunError(f"{path}: cannot open the journal: {error}") from error
        self._length = good

    def append(self, meta: Meta, payload: bytes = b"") -> None:
        """Writes a record; it counts only after `commit`.

        Raises:
            RunError: disk full or read-only. The journal is as before.
        """
        encoded = msgspec.msgpack.encode(meta)
        crc = zlib.crc32(payload, zlib.crc32(encoded))
        record = _HEADER.pack(_MAGIC, _VERSION, 0, len(encoded), len(payload), crc) + encoded + payload
        try:
            written = 0
            while written < len(record):
                written += self._file.write(memoryview(record)[written:])
        except OSError as error:
            self._file.truncate(self._length)
            raise RunError(f"{self.path}: cannot write to the journal: {error}") from error
        self._length += len(record)

    def commit(self) -> None:
        """Returns when all records are on the disk.

        Raises:
            RunError: the disk did not take them.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: cannot sync the journal: {error}") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_journal(path: Path) -> Iterator[tuple[Meta, bytes]]:
    """The whole records of a journal, in order, up to the first that is torn or damaged."""
    for meta, payload, _end in _records(path):
        yield meta, payload


def _good_length(path: Path) -> int:
    return max((end for _meta, _payload, end in _records(path)), default=0)


def _records(path: Path) -> Iterator[tuple[Meta, bytes, int]]:
    decoder = msgspec.msgpack.Decoder(Meta)
    end = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, version, _, meta_length, payload_length, crc = _HEADER.unpack(header)
            if magic != _MAGIC or version != _VERSION or end + _HEADER.size + meta_length + payload_length > size:
                return
            encoded, payload = file.read(meta_length), file.read(payload_length)
            if zlib.crc32(payload, zlib.crc32(encoded)) != crc:
                return
            try:
                meta: Meta = decoder.decode(encoded)
            except msgspec.DecodeError:
                return
            end += _HEADER.size + meta_length + payload_length
            yield meta, payload, end

"""Reading a journal, also a damaged one: every whole record counts, wherever the damage is.

A record that is not whole is skipped by searching for the next one that is. At the end of the file that is a torn
write of something that was never acknowledged; before it, it is damage: what it held is lost, and said.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.journal import HEADER, MAGIC, VERSION, Meta, RoundOpened, checksum

logger = logging.getLogger(__name__)

_START = MAGIC + bytes([VERSION])
# Bytes that one step of the search reads.
_SEARCH_BYTES = 1 << 20
# The search for whole records reads no more than so many times the file: what clients sent may look like a
# thousand beginnings of records.
_SEARCH_FACTOR = 8


class JournalReader:
    """Reads the records of one journal, once.

    Args:
        path: the file.
        opened: its first record, if that is known from elsewhere: then the others can be read without it.

    Attributes:
        length: where the last whole record ends, when all have been read.
        lost: bytes of damage before that.
        size: of the file.
    """

    def __init__(self, path: Path, opened: RoundOpened | None = None) -> None:
        self.path = path
        self.length = 0
        self.lost = 0
        self.size = 0
        self._salt = opened.salt if opened else b""
        self._decoder: msgspec.msgpack.Decoder[Meta] = msgspec.msgpack.Decoder(Meta)

    def __iter__(self) -> Iterator[tuple[Meta, bytes]]:
        """The whole records in order, one at a time in memory.

        Raises:
            RunError: a record is of a later version of edgetrain.
            OSError: not readable.
        """
        with self.path.open("rb") as file:
            size = self.size = os.fstat(file.fileno()).st_size
            budget = _SEARCH_FACTOR * size
            position: int | None = 0
            while position is not None:
                record = self._read(file, position, size)
                if record is None:
                    position = self._next_start(file, position + 1, size)
                    if position is not None:
                        budget -= self._claimed(file, position, size)
                    if budget < 0:
                        logger.warning("%s: too much damage: the search ends at byte %d", self.path, position)
                        position = None
                    continue
                meta, payload, end = record
                if position > self.length:
                    self.lost += position - self.length
                    logger.warning(
                        "%s: bytes %d to %d are damaged: what they held is lost", self.path, self.length, position
                    )
                if isinstance(meta, RoundOpened):
                    self._salt = meta.salt
                self.length = position = end
                yield meta, payload
            if self.length < size:
                logger.warning("%s: the last %d bytes are a torn record", self.path, size - self.length)

    def _read(self, file: BinaryIO, position: int, size: int) -> tuple[Meta, bytes, int] | None:
        file.seek(position)
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        magic, version, _, meta_length, payload_length, crc = HEADER.unpack(header)
        end = position + HEADER.size + meta_length + payload_length
        if magic != MAGIC or version != VERSION or end > size:
            return None
        encoded, payload = file.read(meta_length), file.read(payload_length)
        # Only the first record goes without the salt.
        if checksum(self._salt if position else b"", encoded, payload) != crc:
            return None
        try:
            return self._decoder.decode(encoded), payload, end
        except msgspec.DecodeError as error:
            raise RunError(
                f"{self.path}: the record at byte {position} is of a later version: {error}. Go on with the version "
                "of edgetrain that wrote it, or a newer one."
            ) from error

    def _next_start(self, file: BinaryIO, position: int, size: int) -> int | None:
        while position < size:
            file.seek(position)
            data = file.read(_SEARCH_BYTES)
            if (found := data.find(_START)) >= 0:
                return position + found
            position += max(1, len(data) - len(_START) + 1)
        return None

    def _claimed(self, file: BinaryIO, position: int, size: int) -> int:
        """Bytes that have to be read to find out whether a record begins here."""
        file.seek(position)
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            return 0
        length = HEADER.size + HEADER.unpack(header)[3] + HEADER.unpack(header)[4]
        return length if position + length <= size else HEADER.size


def read_journal(path: Path) -> Iterator[tuple[Meta, bytes]]:
    """The whole records of a journal, in order.

    Raises:
        RunError: a record is of a later version of edgetrain.
        OSError: not readable.
    """
    return iter(JournalReader(path))

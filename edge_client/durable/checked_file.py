"""A small state file that is whole or says so: a header, an opaque body, a checksum over both.

    magic, 2 bytes | version 1 | reserved 0 | length of the header, u32 | CRC-32 of all that follows, u32
    | header, msgpack | body

All numbers are little-endian. Writing replaces the file in one step.
"""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path
from typing import TypeVar

import msgspec

from edgetrain.edge_client.errors import StateError
from edgetrain.protocol.files import write_atomically

logger = logging.getLogger(__name__)

_VERSION = 1
_PREFIX = struct.Struct("<2sBBII")

Header = TypeVar("Header", bound=msgspec.Struct)


class CheckedFile:
    """One file of one kind.

    Args:
        path: of the file.
        magic: two bytes that name the kind.
        content: what it holds, for messages: "the residual".
    """

    def __init__(self, path: Path, magic: bytes, content: str) -> None:
        self.path = path
        self._magic = magic
        self._content = content

    def write(self, header: msgspec.Struct, body: bytes) -> None:
        """Replaces the file.

        Raises:
            StateError: not writable; the old file is still there.
        """
        encoded = msgspec.msgpack.encode(header)
        content = encoded + body
        prefix = _PREFIX.pack(self._magic, _VERSION, 0, len(encoded), zlib.crc32(content))
        try:
            write_atomically(self.path, prefix + content)
        except OSError as error:
            raise StateError(f"{self.path}: cannot store {self._content}: {error}") from error

    def read(self, header: type[Header]) -> tuple[Header, bytes] | None:
        """Header and body; None without a file, and, with a warning, for a damaged one.

        Raises:
            StateError: it is there and cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self.path}: cannot read {self._content}: {error}") from error
        content = data[_PREFIX.size :]
        try:
            magic, version, _, header_bytes, checksum = _PREFIX.unpack_from(data)
            if (magic, version, checksum) != (self._magic, _VERSION, zlib.crc32(content)):
                raise StateError("wrong magic, version or checksum")
            decoded = msgspec.msgpack.decode(content[:header_bytes], type=header)
        except (struct.error, msgspec.DecodeError, StateError) as error:
            logger.warning("%s is damaged (%s): starting without %s", self.path, error, self._content)
            return None
        return decoded, content[header_bytes:]

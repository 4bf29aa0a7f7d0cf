"""A blob on its way in, on the disk: it survives a restart, and takes no memory to speak of.

Two files, named by the SHA-256 of the blob: `DIGEST.part` holds the data at its place, `DIGEST.have` a record for
every chunk that arrived, little-endian:

    offset, u64 | length, u32 | first 8 bytes of the SHA-256 of the data

Neither is synced before the end. After a restart a record counts if the data bears it out, so whatever a power cut
has lost is simply asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Collection
from pathlib import Path

from edgetrain.protocol.blobs import MAX_CHUNK_BYTES, Assembler, Chunk, check_of, check_size
from edgetrain.protocol.errors import BlobError
from edgetrain.protocol.files import sync_directory
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.ranges import RangeSet

# Less than this is not worth the files.
IN_MEMORY_BYTES = 64 << 10
_RECORD = struct.Struct("<QI8s")
_BLOCK = 1 << 16


class PartialBlob:
    """Puts one blob together in a directory.

    Args:
        ref: what was announced.
        directory: for the two files; made if it is not there.
        limit: largest size allowed, in bytes.

    Raises:
        BlobError: the announced size exceeds the limit.
        OSError: the directory cannot be used.
    """

    def __init__(self, ref: BlobRef, directory: Path, *, limit: int) -> None:
        check_size(ref, limit)
        self.ref = ref
        self._directory = directory
        self._data_path, self._log_path = _paths(directory, ref.digest)
        directory.mkdir(parents=True, exist_ok=True)
        self._have = self._recover()

    @property
    def complete(self) -> bool:
        """Nothing is missing."""
        return self._have.size == self.ref.size

    @property
    def begun(self) -> bool:
        """Some of it is here."""
        return bool(self._have)

    def missing(self) -> list[tuple[int, int]]:
        """Half-open byte ranges that have not arrived, ascending."""
        return self._have.gaps(self.ref.size)

    def add(self, chunk: Chunk) -> bool:
        """Takes a chunk; True when nothing is missing any more.

        Raises:
            BlobError: the chunk is of another blob or claims another size.
            OSError: the disk does not take it; the blob is as before.
        """
        if chunk.digest != self.ref.digest or chunk.size != self.ref.size:
            raise BlobError("chunk of another blob")
        stop = chunk.offset + len(chunk.data)
        have = RangeSet([(chunk.offset, stop)])
        if have.without(self._have):
            store_piece(self._directory, chunk)
            self._have.add(chunk.offset, stop)
        return self.complete

    def note(self, start: int, stop: int) -> None:
        """Another process has stored a piece, see `store_piece`."""
        self._have.add(start, stop)

    def finish(self) -> bytes:
        """The blob, verified; its files are gone then.

        Raises:
            BlobError: incomplete, or its SHA-256 is not the announced one; then it starts from nothing.
            OSError: it cannot be read.
        """
        self._verify()
        data = self._data_path.read_bytes() if self.ref.size else b""
        self.discard()
        return data

    def finish_to(self, path: Path) -> None:
        """Moves the blob, verified and synced, to `path` on the same file system.

        Raises:
            BlobError: as `finish`.
            OSError: it cannot be moved; then nothing is lost.
        """
        self._verify()
        if not self.ref.size:
            self._data_path.touch()
        with self._data_path.open("r+b") as file:
            os.fsync(file.fileno())
        self._data_path.replace(path)
        sync_directory(path.parent)
        self.discard()

    def discard(self) -> None:
        """Forgets everything."""
        self._have = RangeSet()
        for path in (self._log_path, self._data_path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _verify(self) -> None:
        if not self.complete:
            raise BlobError("blob is incomplete")
        digest = hashlib.sha256()
        if self.ref.size:
            with self._data_path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        if digest.digest() != self.ref.digest:
            self.discard()
            raise BlobError("the chunks add up to another blob than the one announced")

    def _recover(self) -> RangeSet:
        have = RangeSet()
        try:
            log, data = self._log_path.open("rb"), self._data_path.open("rb")
        except FileNotFoundError:
            self._have = have
            self.discard()
            return have
        with log, data:
            while len(record := log.read(_RECORD.size)) == _RECORD.size:
                offset, length, check = _RECORD.unpack(record)
                # Longer chunks are not made, and would have to be read whole.
                if length > MAX_CHUNK_BYTES or offset + length > self.ref.size:
                    break
                data.seek(offset)
                part = data.read(length)
                if len(part) == length and check_of(part) == check:
                    have.add(offset, offset + length)
        # What follows half a record could not be read later.
        os.truncate(self._log_path, self._log_path.stat().st_size // _RECORD.size * _RECORD.size)
        return have


def store_piece(directory: Path, chunk: Chunk) -> None:
    """Stores a piece of a blob for whoever puts it together in `directory`, as a `PartialBlob`, which is there first.

    Raises:
        OSError: the disk does not take it.
    """
    data_path, log_path = _paths(directory, chunk.digest)
    _write_at(data_path, chunk.data, chunk.offset)
    _write_at(log_path, _RECORD.pack(chunk.offset, len(chunk.data), chunk.sha256[:8]), None)


def read_whole(directory: Path, ref: BlobRef) -> bytes:
    """A blob whose pieces are all in `directory`, verified; its files stay.

    Raises:
        BlobError: its SHA-256 is not the announced one.
        OSError: it cannot be read.
    """
    data = _paths(directory, ref.digest)[0].read_bytes()
    if len(data) != ref.size or hashlib.sha256(data).digest() != ref.digest:
        raise BlobError("the chunks add up to another blob than the one announced")
    return data


def has_pieces(directory: Path, digest: bytes) -> bool:
    """Whether pieces of a blob are in `directory`."""
    return _paths(directory, digest)[1].exists()


def assemble(ref: BlobRef, directory: Path, *, limit: int) -> Assembler | PartialBlob:
    """Puts a small blob together in memory, any other in `directory`.

    Raises:
        BlobError: the announced size exceeds the limit.
        OSError: the directory cannot be used.
    """
    small = ref.size <= IN_MEMORY_BYTES
    return Assembler(ref, limit=limit) if small else PartialBlob(ref, directory, limit=limit)


def forget_partial_blobs(directory: Path, *, keep: Collection[bytes] = ()) -> int:
    """Deletes what is left of blobs that nobody waits for any more.

    Args:
        directory: that `PartialBlob`s were made in; may be missing.
        keep: digests of those that are still wanted.

    Returns:
        Bytes deleted.
    """
    kept, freed = {digest.hex() for digest in keep}, 0
    for path in directory.glob("*"):
        if path.suffix in {".part", ".have"} and path.stem not in kept:
            with contextlib.suppress(OSError):
                freed += path.stat().st_size
                path.unlink()
    return freed


def _paths(directory: Path, digest: bytes) -> tuple[Path, Path]:
    """Data, and the log of what is in it."""
    return directory / f"{digest.hex()}.part", directory / f"{digest.hex()}.have"


def _write_at(path: Path, data: bytes | memoryview, offset: int | None) -> None:
    """Writes at an offset, or at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if offset is None else 0), 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
            view = view[written:]
            offset = None if offset is None else offset + written
    finally:
        os.close(descriptor)

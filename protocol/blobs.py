"""Content-addressed blobs cut in chunks.

A chunk on the wire, little-endian:

    "EC" | version 1 | reserved 0 | SHA-256 of the blob, 32 | offset, u64 | size of the blob, u64
    | first 8 bytes of the SHA-256 of the data | data

Chunks may arrive in any order, more than once, and cut differently each time.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

import msgspec

from edgetrain.protocol.errors import BlobError
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.ranges import RangeSet

DEFAULT_CHUNK_BYTES = 60 << 10
MIN_CHUNK_BYTES = 1 << 10
# Brokers that carry larger messages are rare, and senders of them rarer.
MAX_CHUNK_BYTES = 1 << 20
_HEADER = struct.Struct("<2sBB32sQQ8s")
HEADER_BYTES = _HEADER.size
_MAGIC, _VERSION = b"EC", 1


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A part of a blob: bytes [offset, offset + len(data)) of `size`."""

    digest: bytes
    offset: int
    size: int
    data: memoryview
    # SHA-256 of the data.
    sha256: bytes

    @property
    def is_whole(self) -> bool:
        """It is all of its blob, and the right bytes."""
        return self.offset == 0 and len(self.data) == self.size and self.sha256 == self.digest


def blob_ref(data: bytes | memoryview) -> BlobRef:
    """Digest and size of `data`."""
    return BlobRef(digest=hashlib.sha256(data).digest(), size=len(data))


class Blob:
    """A whole blob that is to be sent; of a mapped file only what is being sent is in memory.

    Args:
        data: the whole of it.
        ref: if it is known already.
    """

    def __init__(self, data: bytes | memoryview, ref: BlobRef | None = None) -> None:
        self.ref = ref or blob_ref(data)
        self._data = memoryview(data)

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop). Called from the network's thread."""
        return self._data[start:stop]


def cut(
    ref: BlobRef,
    data: bytes | memoryview,
    ranges: Sequence[tuple[int, int]] = (),
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Iterator[bytes]:
    """The chunks of `data`, ready for the wire.

    Args:
        ref: digest and size of `data`.
        data: the whole blob.
        ranges: half-open byte ranges to send; empty for all. Parts beyond the end are left out.
        chunk_bytes: most payload bytes in one chunk.
    """
    view = memoryview(data)
    for start, stop in ranges or ((0, ref.size),):
        for offset in range(start, min(stop, ref.size), chunk_bytes):
            part = view[offset : min(offset + chunk_bytes, stop, ref.size)]
            yield make_chunk(ref, offset, part)


def make_chunk(ref: BlobRef, offset: int, data: bytes | memoryview) -> bytes:
    """One chunk, ready for the wire."""
    return _HEADER.pack(_MAGIC, _VERSION, 0, ref.digest, offset, ref.size, check_of(data)) + data


def check_of(data: bytes | memoryview) -> bytes:
    """The 8 bytes that vouch for a chunk's data."""
    return hashlib.sha256(data).digest()[:8]


def parse_chunk(payload: bytes) -> Chunk:
    """Reads a chunk.

    Raises:
        BlobError: not a chunk, damaged, or it lies outside its own blob.
    """
    if len(payload) <= HEADER_BYTES:
        raise BlobError(f"chunk of {len(payload)} bytes is shorter than its header")
    magic, version, _, digest, offset, size, check = _HEADER.unpack_from(payload)
    if magic != _MAGIC or version != _VERSION:
        raise BlobError("not an edgetrain chunk, or of another version")
    data = memoryview(payload)[HEADER_BYTES:]
    if offset + len(data) > size:
        raise BlobError(f"chunk [{offset}, {offset + len(data)}) lies outside its blob of {size} bytes")
    sha256 = hashlib.sha256(data).digest()
    if sha256[:8] != check:
        raise BlobError(f"chunk at offset {offset} is damaged")
    return Chunk(digest, offset, size, data, sha256)


def check_size(ref: BlobRef, limit: int) -> None:
    """What is announced must not be larger than what is taken.

    Raises:
        BlobError: it is.
    """
    if ref.size > limit:
        raise BlobError(f"blob of {ref.size} bytes exceeds the limit of {limit}")


class Assembler:
    """Puts one blob together.

    Args:
        ref: what was announced. The memory for it is taken at the first chunk.
        limit: largest size allowed, in bytes.

    Raises:
        BlobError: the announced size exceeds the limit.
    """

    def __init__(self, ref: BlobRef, *, limit: int) -> None:
        check_size(ref, limit)
        self.ref = ref
        self._data: bytearray | None = None
        self._have = RangeSet()
        # It came in one piece, which was verified then.
        self._whole: memoryview | None = None

    def add(self, chunk: Chunk) -> bool:
        """Takes a chunk; True when nothing is missing any more.

        Raises:
            BlobError: the chunk is of another blob or claims another size.
        """
        if chunk.digest != self.ref.digest or chunk.size != self.ref.size:
            raise BlobError("chunk of another blob")
        if chunk.is_whole:
            self._whole = chunk.data
            return True
        if self._data is None:
            self._data = bytearray(self.ref.size)
        stop = chunk.offset + len(chunk.data)
        self._data[chunk.offset : stop] = chunk.data
        self._have.add(chunk.offset, stop)
        return self.complete

    @property
    def complete(self) -> bool:
        """Nothing is missing."""
        return self._whole is not None or (len(self._have) == 1 and self._have.size == self.ref.size)

    @property
    def begun(self) -> bool:
        """Some of it is here."""
        return self._whole is not None or bool(self._have)

    def missing(self) -> list[tuple[int, int]]:
        """Half-open byte ranges that have not arrived, ascending."""
        return [] if self._whole is not None else self._have.gaps(self.ref.size)

    def discard(self) -> None:
        """Forgets everything."""
        self._data, self._have, self._whole = None, RangeSet(), None

    def finish(self) -> bytes:
        """The blob, verified.

        Raises:
            BlobError: incomplete, or its SHA-256 is not the announced one; then it starts from nothing.
        """
        if not self.complete and self.ref.size:
            raise BlobError("blob is incomplete")
        if self._whole is not None:
            return bytes(self._whole)
        data = bytes(self._data or b"")
        if hashlib.sha256(data).digest() != self.ref.digest:
            self.discard()
            raise BlobError("the chunks add up to another blob than the one announced")
        return data

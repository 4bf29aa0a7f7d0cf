"""MQTT packets in a stream of bytes, and an account of the blob bytes that crossed a link more than once."""

from __future__ import annotations

from collections.abc import Iterator

from edgetrain.protocol.blobs import parse_chunk
from edgetrain.protocol.ranges import RangeSet

PUBLISH = 3
_CHUNK = b"EC\x01\x00"


class Frames:
    """Cuts a stream into packets."""

    def __init__(self) -> None:
        # Bytes of the packet that has begun.
        self.rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.rest += data
        while (length := _length(self.rest)) is not None and len(self.rest) >= length:
            packet, self.rest = self.rest[:length], self.rest[length:]
            yield packet


def _length(data: bytes) -> int | None:
    """Of the first packet, header and all; None while that is not known."""
    value = shift = 0
    for index, byte in enumerate(data[1:5]):
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return 2 + index + value
    return None


def kind_of(packet: bytes) -> str:
    """ "chunk", or the type of the message in a packet, or "" for any other packet."""
    if packet[0] >> 4 != PUBLISH:
        return ""
    if _CHUNK in packet:
        return "chunk"
    at = packet.find(b"\xa4type") + 5
    return packet[at + 1 : at + 1 + (packet[at] & 0x1F)].decode() if at >= 5 else ""


class Account:
    """What crossed a link in one direction."""

    def __init__(self) -> None:
        self.bytes = 0
        self.blob_bytes = 0
        # Of packets that a cut has halved.
        self.lost = 0
        self._blobs: dict[bytes, RangeSet] = {}

    def packet(self, packet: bytes) -> None:
        if packet[0] >> 4 == PUBLISH and (at := packet.find(_CHUNK)) >= 0:
            chunk = parse_chunk(packet[at:])
            self.blob_bytes += len(chunk.data)
            self._blobs.setdefault(chunk.digest, RangeSet()).add(chunk.offset, chunk.offset + len(chunk.data))

    @property
    def distinct(self) -> int:
        """Blob bytes, each counted once."""
        return sum(ranges.size for ranges in self._blobs.values())

    @property
    def retransmitted(self) -> float:
        """Bytes that crossed in vain, whole chunks or halves, as a share of the distinct ones."""
        return (self.blob_bytes - self.distinct + self.lost) / max(self.distinct, 1)

"""The two MQTT packets that carry nearly everything, to bytes and back: PUBLISH and PUBACK.

MQTT 3.1.1, sections 3.3 and 3.4; MQTT 5.0, the same. The others are paho's.
"""

from __future__ import annotations

import struct

import msgspec

PUBLISH, PUBACK = 0x30, 0x40
_EXPIRY, _ALIAS = 0x02, 0x23
# Lengths have at most four bytes of seven bits.
_LENGTH_BYTES = 4


class PacketError(ValueError):
    """What a broker sent is no MQTT."""


class Publish(msgspec.Struct, frozen=True, gc=False):
    """A message that has arrived."""

    topic: str
    payload: bytes
    qos: int
    # Packet id; 0 for QoS 0.
    packet: int


class PacketBuffer:
    """Cuts a stream of bytes into packets."""

    def __init__(self) -> None:
        self._data = b""
        self._start = 0
        # What was fed since; joined when the next packet is whole, which from here on takes so many bytes.
        self._fed: list[bytes] = []
        self._missing = 1

    def feed(self, data: bytes) -> None:
        """Takes what has arrived."""
        self._fed.append(data)
        self._missing -= len(data)

    def next(self) -> tuple[int, memoryview] | None:
        """(first byte, what follows the length) of the next whole packet.

        Raises:
            PacketError: the length is none.
        """
        if self._fed:
            if self._missing > 0:
                return None
            self._data = b"".join((self._data[self._start :], *self._fed))
            self._start = 0
            self._fed.clear()
        data, position = self._data, self._start + 1
        length = 0
        for index in range(_LENGTH_BYTES + 1):
            if position >= len(data):
                self._missing = 1
                return None
            if index == _LENGTH_BYTES:
                raise PacketError("a length of more than four bytes")
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                break
        end = position + length
        if end > len(data):
            self._missing = end - len(data)
            return None
        first, self._start = data[self._start], end
        return first, memoryview(data)[position:end]


def decode_publish(first: int, body: memoryview, *, version_5: bool) -> Publish:
    """A PUBLISH packet.

    Raises:
        PacketError: it is none.
    """
    qos = first >> 1 & 3
    if qos > 1:
        raise PacketError(f"QoS {qos}, for which nobody has asked")
    try:
        length = body[0] << 8 | body[1]
        # A client can make one that is no text; then nobody has that name, but it is no reason to hang up.
        topic = str(body[2 : 2 + length], "utf-8", "replace")
        position = 2 + length
        packet = 0
        if qos:
            packet = body[position] << 8 | body[position + 1]
            position += 2
        if version_5:
            properties, position = _length_at(body, position)
            position += properties
    except IndexError as error:
        raise PacketError(f"a PUBLISH that is none: {error}") from error
    if position > len(body) or not topic:
        raise PacketError("a PUBLISH that ends in its header")
    return Publish(topic, bytes(body[position:]), qos, packet)


def encode_publish(
    topic: str,
    payload: bytes,
    packet: int,
    *,
    retain: bool = False,
    version_5: bool,
    expiry_seconds: int = 0,
    alias: int = 0,
) -> bytes:
    """A PUBLISH packet of QoS 1.

    Args:
        topic: where to; "" if an alias stands for it.
        payload: of the message.
        packet: its id, 1 to 65,535.
        retain: for later subscribers.
        version_5: with properties; the rest is only for it.
        expiry_seconds: after which nobody gets it any more; 0 for never.
        alias: of the topic; 0 for none.
    """
    name = topic.encode()
    head = struct.pack("!H", len(name)) + name + struct.pack("!H", packet)
    if version_5:
        properties = struct.pack("!BI", _EXPIRY, expiry_seconds) if expiry_seconds else b""
        properties += struct.pack("!BH", _ALIAS, alias) if alias else b""
        head += bytes([len(properties)]) + properties
    first = PUBLISH | 2 | (1 if retain else 0)
    return b"".join((bytes([first]), _encoded_length(len(head) + len(payload)), head, payload))


def decode_puback(body: memoryview) -> tuple[int, int]:
    """(packet id, reason code) of a PUBACK packet.

    Raises:
        PacketError: it is none.
    """
    if len(body) < 2:
        raise PacketError("a PUBACK without a packet id")
    return struct.unpack_from("!H", body)[0], body[2] if len(body) > 2 else 0


def encode_puback(packet: int) -> bytes:
    """A PUBACK packet."""
    return struct.pack("!BBH", PUBACK, 2, packet)


def _encoded_length(length: int) -> bytes:
    out = bytearray()
    while length >= 0x80:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)


def _length_at(body: memoryview, position: int) -> tuple[int, int]:
    """(a length, where it ends)."""
    value = 0
    for index in range(_LENGTH_BYTES):
        byte = body[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise PacketError("a length of more than four bytes")

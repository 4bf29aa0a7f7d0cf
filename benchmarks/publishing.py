"""Publishing as fast as a broker takes it: what a benchmark's driver must not spend its processors on."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Sequence

from edgetrain.protocol.transport.packets import PUBACK, PacketBuffer, encode_publish

_READ_BYTES = 1 << 16


class Publisher:
    """A connection to a broker on the loopback interface that publishes messages of QoS 1 made ready before.

    paho needs 50 us of processor time a message; a thousand devices would spend theirs elsewhere.

    Args:
        port: of the broker, which speaks MQTT 5.
        messages: (topic, payload) of each.
        in_flight: messages ahead of their acknowledgements, no more than the broker allows.
    """

    def __init__(self, port: int, messages: Sequence[tuple[str, bytes]], *, in_flight: int) -> None:
        numbers = itertools.cycle(range(1, 1 << 16))
        self._packets = [
            encode_publish(topic, payload, packet, version_5=True)
            for (topic, payload), packet in zip(messages, numbers, strict=False)
        ]
        self._in_flight = in_flight
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        name = b"publisher"
        # CONNECT: clean start, no keep-alive, no properties.
        body = b"\0\4MQTT\5\2\0\0\0" + struct.pack("!H", len(name)) + name
        self._socket.sendall(bytes([0x10, len(body)]) + body)
        self._received = PacketBuffer()
        first, answer = self._next()
        assert first == 0x20, "no CONNACK"
        assert answer[1] == 0, f"refused: {answer[1]}"

    def publish(self) -> None:
        """Publishes all of them; returns when the broker has taken the last."""
        sent = acknowledged = 0
        while acknowledged < len(self._packets):
            ready = self._packets[sent : acknowledged + self._in_flight]
            if ready:
                self._socket.sendall(b"".join(ready))
                sent += len(ready)
            acknowledged += self._acknowledged()

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()

    def _acknowledged(self) -> int:
        """Waits for acknowledgements; how many have come."""
        count = int(self._next()[0] == PUBACK)
        while (packet := self._received.next()) is not None:
            count += packet[0] == PUBACK
        return count

    def _next(self) -> tuple[int, memoryview]:
        while (packet := self._received.next()) is None:
            data = self._socket.recv(_READ_BYTES)
            assert data, "the broker has hung up"
            self._received.feed(data)
        return packet

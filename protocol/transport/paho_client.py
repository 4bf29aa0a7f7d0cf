"""paho's client with a shorter way for the packets that carry nearly everything.

paho reads a packet by several calls into the kernel, wraps it into several objects and answers it by another call; a
coordinator has thousands a second. Messages and their acknowledgements are read and written here; the rest is paho's.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable

import paho.mqtt.client as paho
from paho.mqtt import MQTTException
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion

from edgetrain.protocol.transport.packets import (
    PUBACK,
    PUBLISH,
    PacketBuffer,
    PacketError,
    Publish,
    decode_puback,
    decode_publish,
)

_READ_BYTES = 1 << 20


class PahoClient(paho.Client):
    """paho's client, that closes what it opens. Driven by one thread: `read`, `handle`, `loop_write`, `loop_misc`."""

    raw: socket.socket | None = None
    # What TLS said when it gave up: an alert of the broker's, e.g. that our certificate was revoked.
    alert = ""

    def prepare(self, *, on_publish: Callable[[Publish], None], on_puback: Callable[[int, int], None]) -> None:
        """Says who hears of messages, and of acknowledgements as (packet id, reason code)."""
        self._on_message_packet = on_publish
        self._on_puback_packet = on_puback
        self._packets = PacketBuffer()
        # Whether this is MQTT 5.
        self.version_5 = self.protocol == MQTTProtocolVersion.MQTTv5

    def read(self) -> MQTTErrorCode:
        """Takes what the network has; `handle` handles it."""
        if self._sock is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        try:
            data = self._sock_recv(_READ_BYTES)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError:
            data = b""
        if not data:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        with self._msgtime_mutex:
            self._last_bytes_received = time.monotonic()
        self._packets.feed(data)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def handle(self, until: Callable[[], bool]) -> MQTTErrorCode:
        """Handles the whole packets that are here, `until`."""
        try:
            while self._sock is not None and not until() and (packet := self._packets.next()) is not None:
                result = self._handle(*packet)
                if result > 0:
                    return self._loop_rc_handle(result)
        except (PacketError, MQTTException):
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_PROTOCOL)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def write(self, packets: Iterable[bytes]) -> None:
        """Sends packets made by us; what does not fit waits for `loop_write`. A failure shows at the next `read`."""
        # Some brokers read one packet of a WebSocket's frame and forget the rest.
        batches = packets if self._transport == "websockets" else [b"".join(packets)]
        for batch in batches:
            # The command only matters for packets of paho's own.
            self._packet_queue(PUBACK, batch, 0, 1)

    def next_packet(self) -> int:
        """A packet id that is not in use."""
        return int(self._mid_generate())

    def _handle(self, first: int, body: memoryview) -> MQTTErrorCode:
        kind = first & 0xF0
        if kind == PUBLISH:
            self._on_message_packet(decode_publish(first, body, version_5=self.version_5))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        if kind == PUBACK:
            self._on_puback_packet(*decode_puback(body))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        self._in_packet = {
            "command": first,
            "have_remaining": 1,
            "remaining_count": [],
            "remaining_mult": 1,
            "remaining_length": len(body),
            "packet": bytearray(body),
            "to_process": 0,
            "pos": 0,
        }
        return self._packet_handle()

    def _create_socket_connection(self) -> socket.socket:
        self.raw = super()._create_socket_connection()
        with contextlib.suppress(OSError):
            # A control message does not wait for a full packet.
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.raw

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        # A handshake that fails leaves the wrapped socket nowhere else.
        assert self._ssl_context, "set by tls_set"
        wrapped = self._ssl_context.wrap_socket(tcp_sock, server_hostname=self._host, do_handshake_on_connect=False)
        self.raw = wrapped
        wrapped.settimeout(self._connect_timeout)
        wrapped.do_handshake()
        return wrapped

    def _sock_recv(self, bufsize: int) -> bytes:
        try:
            return super()._sock_recv(bufsize)
        except ssl.SSLError as error:
            self.alert = str(error)
            raise

    def _sock_send(self, buf: bytes | bytearray) -> int:
        sent = super()._sock_send(buf)
        if not sent and buf:
            # A WebSocket frame that left in part only: paho would drop its packet.
            raise BlockingIOError
        return sent

    def release(self) -> None:
        """Closes the sockets that paho would leave to the garbage collector."""
        self._reset_sockets()
        if self.raw is not None:
            self.raw.close()
            self.raw = None

    def interrupt(self) -> None:
        """Ends whatever waits for the network, from another thread."""
        raw = self.raw
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)

"""One MQTT connection, from CONNECT to its end, driven by one thread. A reconnect is another connection.

paho speaks the protocol; waiting, pacing and trying again are ours, since paho's own loop can neither hold back
what a cap forbids, nor jitter its retries, nor watch more than 1,024 descriptors.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgetrain.protocol.transport.outgoing import Control, Piece

# How long the broker keeps a session (and its queue) of somebody who is away.
SESSION_EXPIRY_SECONDS = 3600
# A message that nobody fetched for so long is news to nobody; a chunk is asked for again much sooner.
MESSAGE_EXPIRY_SECONDS = 3600
CHUNK_EXPIRY_SECONDS = 120
# Messages that we take before we have dealt with the first of them: with 60 KiB each, 4 MB of memory.
RECEIVE_MAXIMUM = 64
# And that we send before the broker has acknowledged the first: hides the round trip on a fast link.
SEND_MAXIMUM = 64
# Larger packets than this are not for us.
MAX_PACKET_BYTES = 1 << 20
# Packets have a header, a topic and properties besides their payload: no more than this.
PACKET_OVERHEAD_BYTES = 256
_TICK_SECONDS = 1.0


class PahoClient(paho.Client):
    """paho's client, that closes what it opens."""

    raw: socket.socket | None = None
    # What TLS said when it gave up: an alert of the broker's, e.g. that our certificate was revoked.
    alert = ""

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


class Connection:
    """One connection.

    Args:
        client: configured, with its will, not yet connected.
        on_message: is called with every message.
        on_acknowledged: is called with the packet id of what the broker has taken.
        on_subscribed: is called with the packet id of a confirmed subscription.
    """

    def __init__(
        self,
        client: PahoClient,
        *,
        on_message: Callable[[paho.MQTTMessage], None],
        on_acknowledged: Callable[[int, str | None], None],
        on_subscribed: Callable[[int], None],
    ) -> None:
        self.client = client
        # None until the broker has answered; then "" or why it refused.
        self._answer: str | None = None
        self._ended: str | None = None
        self.heard_at = time.monotonic()
        # What the broker allows; MQTT 3.1.1 cannot say.
        self.max_packet_bytes = 0
        self.receive_maximum = SEND_MAXIMUM
        self._alias_maximum = 0
        self._aliases: dict[str, int] = {}
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = lambda _c, _u, message: on_message(message)
        client.on_publish = lambda _c, _u, mid, reason, _p: on_acknowledged(mid, _failure(reason))
        client.on_subscribe = lambda _c, _u, mid, _r, _p: on_subscribed(mid)

    @property
    def version_5(self) -> bool:
        """Whether this is MQTT 5."""
        return bool(self.client.protocol == MQTTProtocolVersion.MQTTv5)

    def open(self, host: str, port: int, *, keepalive: int, timeout: float) -> str | None:
        """Connects; None, or why not."""
        options: dict[str, Any] = {}
        if self.version_5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            options = {"clean_start": False, "properties": properties}
        deadline = time.monotonic() + timeout
        self.client.connect_timeout = timeout
        try:
            self.client.connect(host, port, keepalive, **options)
            while self._answer is None and self._ended is None and time.monotonic() < deadline:
                self.pump(None, 0.05)
        except (OSError, ValueError) as error:
            self.client.release()
            return str(error) or type(error).__name__
        if self._answer == "" and self._ended is None:
            return None
        closed = "the broker closed the connection" if self._ended is not None else ""
        failure = self._answer or self.client.alert or closed
        self.client.disconnect()
        self.client.release()
        return failure or "it does not answer as an MQTT broker"

    def pump(self, wake: socket.socket | None, timeout: float) -> str | None:
        """Waits for the network or for a byte on `wake`, and handles what there is.

        Returns:
            None; or why the connection has ended.
        """
        client, sock = self.client, self.client.socket()
        if sock is None or self._ended is not None:
            return self._ended or "connection lost"
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN | (select.POLLOUT if client.want_write() else 0))
        if wake is not None:
            poller.register(wake.fileno(), select.POLLIN)
        pending = getattr(sock, "pending", lambda: 0)() > 0
        ready = dict(poller.poll(0 if pending else 1000 * min(timeout, _TICK_SECONDS)))
        if wake is not None and wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
        seen = ready.get(sock.fileno(), 0)
        result = MQTTErrorCode.MQTT_ERR_SUCCESS
        if pending or seen & (select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            self.heard_at = time.monotonic()
            result = client.loop_read()
        if result == MQTTErrorCode.MQTT_ERR_SUCCESS and seen & select.POLLOUT:
            result = client.loop_write()
        if result == MQTTErrorCode.MQTT_ERR_SUCCESS:
            result = client.loop_misc()
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS or client.socket() is None:
            self._ended = client.alert or self._ended or paho.error_string(result)
        return self._ended

    def publish(self, what: Control | Piece) -> int | None:
        """Hands a message to the network; its packet id, or None if the connection has ended."""
        topic, properties = what.topic, None
        if self.version_5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            if isinstance(what, Piece):
                properties.MessageExpiryInterval = CHUNK_EXPIRY_SECONDS
                topic = self._alias(topic, properties)
            elif not what.retain:
                properties.MessageExpiryInterval = MESSAGE_EXPIRY_SECONDS
        retain = isinstance(what, Control) and what.retain
        info = self.client.publish(topic, what.payload, qos=1, retain=retain, properties=properties)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def subscribe(self, topics: list[tuple[str, int]]) -> int | None:
        """Asks for topics; the packet id of the request, or None if the connection has ended."""
        result, mid = self.client.subscribe(topics)
        return mid if result == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def close(self, timeout: float) -> None:
        """Says goodbye, so that no last will is published."""
        deadline = time.monotonic() + timeout
        self.client.disconnect()
        while self.client.socket() is not None and time.monotonic() < deadline:
            if self.pump(None, 0.05) is not None:
                break
        self.client.release()

    def _alias(self, topic: str, properties: Properties) -> str:
        """The topic to write; an alias stands for it from the second time on."""
        if (alias := self._aliases.get(topic)) is not None:
            properties.TopicAlias = alias
            return ""
        if len(self._aliases) < self._alias_maximum:
            self._aliases[topic] = properties.TopicAlias = len(self._aliases) + 1
        return topic

    def _on_connect(self, _c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, properties: Properties | None) -> None:
        self._answer = str(reason) if reason.is_failure else ""
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", 0)
        self.receive_maximum = min(SEND_MAXIMUM, getattr(properties, "ReceiveMaximum", SEND_MAXIMUM))
        self._alias_maximum = getattr(properties, "TopicAliasMaximum", 0)

    def _on_disconnect(self, _c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        self._ended = str(reason)


def make_client(version: MQTTProtocolVersion, client_id: str, *, transport: str) -> PahoClient:
    """A client whose session the broker keeps, and that acknowledges a message when it has been dealt with."""
    extra: dict[str, Any] = {} if version == MQTTProtocolVersion.MQTTv5 else {"clean_session": False}
    client = PahoClient(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=version,
        transport=transport,  # type: ignore[arg-type]
        reconnect_on_failure=False,
        manual_ack=True,
        **extra,
    )
    # We count them ourselves.
    client.max_inflight_messages_set(0)
    return client


def _failure(reason: ReasonCode) -> str | None:
    return str(reason) if reason.is_failure else None

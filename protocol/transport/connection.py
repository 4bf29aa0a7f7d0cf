"""One MQTT connection, from CONNECT to its end, driven by one thread. A reconnect is another connection.

paho speaks the protocol; waiting, pacing and trying again are ours, since paho's own loop can neither hold back
what a cap forbids, nor jitter its retries, nor watch more than 1,024 descriptors.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgetrain.protocol.transport.outgoing import Control, Piece
from edgetrain.protocol.transport.packets import Publish, encode_puback, encode_publish
from edgetrain.protocol.transport.paho_client import PahoClient

# How long the broker keeps a session (and its queue) of somebody who is away.
SESSION_EXPIRY_SECONDS = 3600
# A message that nobody fetched for so long is news to nobody; a chunk is asked for again much sooner.
MESSAGE_EXPIRY_SECONDS = 3600
CHUNK_EXPIRY_SECONDS = 120
# Messages that we take before we have dealt with the first of them: with 60 KiB each, 4 MB of memory.
RECEIVE_MAXIMUM = 64
# For those who deal with the messages of many, and sync a disk between: four times as much.
RECEIVE_MAXIMUM_OF_MANY = 512
# And that we send before the broker has acknowledged the first: hides the round trip on a fast link.
SEND_MAXIMUM = 64
# Larger packets than this are not for us.
MAX_PACKET_BYTES = 1 << 20
# Packets have a header, a topic and properties besides their payload: no more than this.
PACKET_OVERHEAD_BYTES = 256
_TICK_SECONDS = 1.0


class Connection:
    """One connection.

    Args:
        client: configured, with its will, not yet connected.
        lasting: whether the broker keeps our session while we are away.
        most_received: messages that the broker may send ahead of their acknowledgements.
        on_message: is called with every message.
        on_acknowledged: is called with the packet id of what the broker has taken, or will not take, and why not.
        on_subscribed: is called with the packet id of a confirmed subscription.
    """

    def __init__(
        self,
        client: PahoClient,
        *,
        lasting: bool,
        most_received: int,
        on_message: Callable[[Publish], None],
        on_acknowledged: Callable[[int, str | None], None],
        on_subscribed: Callable[[int], None],
    ) -> None:
        self.client = client
        self._lasting = lasting
        self._most_received = most_received
        # An MQTT 5 broker says it if it does not.
        self.shares_subscriptions = False
        # None until the broker has answered; then "" or why it refused.
        self._answer: str | None = None
        self._ended: str | None = None
        self.heard_at = time.monotonic()
        # What the broker allows; MQTT 3.1.1 cannot say.
        self.max_packet_bytes = 0
        self.receive_maximum = SEND_MAXIMUM
        self._alias_maximum = 0
        self._aliases: dict[str, int] = {}
        # There may be more packets than were handled.
        self._unhandled = False
        # What is to be sent with the next `flush`.
        self._unsent: list[bytes] = []
        client.prepare(on_publish=on_message, on_puback=lambda packet, code: on_acknowledged(packet, _failure(code)))
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = lambda _c, _u, mid, _r, _p: on_subscribed(mid)

    @property
    def version_5(self) -> bool:
        """Whether this is MQTT 5."""
        return self.client.version_5

    def open(self, host: str, port: int, *, keepalive: int, timeout: float) -> str | None:
        """Connects; None, or why not."""
        options: dict[str, Any] = {}
        if self.version_5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS if self._lasting else 0
            properties.ReceiveMaximum = self._most_received
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            options = {"clean_start": not self._lasting, "properties": properties}
        deadline = time.monotonic() + timeout
        self.client.connect_timeout = timeout
        try:
            self.client.connect(host, port, keepalive, **options)
            while self._answer is None and self._ended is None and time.monotonic() < deadline:
                # What the broker says after its answer is for those who use the connection.
                self.pump(None, 0.05, until=lambda: self._answer is not None)
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

    def pump(
        self,
        wake: socket.socket | None,
        timeout: float,
        *,
        until: Callable[[], bool] = lambda: False,
        reading: bool = True,
        rest: float = 0.0,
    ) -> str | None:
        """Waits for the network or for a byte on `wake`, and handles what there is (or a part of it, `until`).

        Args:
            wake: ends the wait.
            timeout: in seconds.
            until: enough was handled.
            reading: whether to look at what has arrived.
            rest: seconds that pass between two looks; what comes sooner waits, for more to come with it.

        Returns:
            None; or why the connection has ended.
        """
        client, sock = self.client, self.client.socket()
        if sock is None or self._ended is not None:
            return self._ended or "connection lost"
        poller = select.poll()
        poller.register(
            sock.fileno(), (select.POLLIN if reading else 0) | (select.POLLOUT if client.want_write() else 0)
        )
        if wake is not None:
            poller.register(wake.fileno(), select.POLLIN)
        pending = reading and (getattr(sock, "pending", lambda: 0)() > 0 or self._unhandled)
        ready = dict(poller.poll(0 if pending else 1000 * min(timeout, _TICK_SECONDS)))
        seen = ready.get(sock.fileno(), 0)
        early = self.heard_at + rest - time.monotonic()
        if seen == select.POLLIN and early > 0 and not pending:
            poller.modify(sock.fileno(), 0)
            ready |= dict(poller.poll(1000 * early))
            # Whoever woke us comes first; what has arrived is still there then.
            seen = 0 if wake is not None and wake.fileno() in ready else seen
        if wake is not None and wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
        result = MQTTErrorCode.MQTT_ERR_SUCCESS
        if pending or seen & (select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            self.heard_at = time.monotonic()
            if not self._unhandled:
                result = client.read()
            if result == MQTTErrorCode.MQTT_ERR_SUCCESS:
                result = client.handle(until)
            self._unhandled = until()
        if result == MQTTErrorCode.MQTT_ERR_SUCCESS and seen & select.POLLOUT:
            result = client.loop_write()
        if result == MQTTErrorCode.MQTT_ERR_SUCCESS:
            result = client.loop_misc()
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS or client.socket() is None:
            self._ended = client.alert or self._ended or paho.error_string(result)
        return self._ended

    def publish(self, what: Control | Piece) -> int:
        """Queues a message; `flush` hands it to the network. Its packet id."""
        packet, topic, alias = self.client.next_packet(), what.topic, 0
        if isinstance(what, Piece):
            topic, alias = self._aliased(topic)
            expiry = CHUNK_EXPIRY_SECONDS
        else:
            expiry = 0 if what.retain else MESSAGE_EXPIRY_SECONDS
        self._unsent.append(
            encode_publish(
                topic,
                what.payload,
                packet,
                retain=isinstance(what, Control) and what.retain,
                version_5=self.version_5,
                expiry_seconds=expiry,
                alias=alias,
            )
        )
        return packet

    def acknowledge(self, packet: int) -> None:
        """Queues that a message has been dealt with."""
        self._unsent.append(encode_puback(packet))

    def flush(self) -> None:
        """Hands what is queued to the network, by one call. If that fails, so does the next `pump`."""
        if self._unsent:
            packets, self._unsent = self._unsent, []
            self.client.write(packets)

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

    def _aliased(self, topic: str) -> tuple[str, int]:
        """(topic, alias) to write; the alias stands for the topic from the second time on."""
        if (alias := self._aliases.get(topic)) is not None:
            return "", alias
        if len(self._aliases) >= self._alias_maximum:
            return topic, 0
        self._aliases[topic] = len(self._aliases) + 1
        return topic, self._aliases[topic]

    def _on_connect(self, _c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, properties: Properties | None) -> None:
        self._answer = str(reason) if reason.is_failure else ""
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", 0)
        self.receive_maximum = min(SEND_MAXIMUM, getattr(properties, "ReceiveMaximum", SEND_MAXIMUM))
        self._alias_maximum = getattr(properties, "TopicAliasMaximum", 0)
        self.shares_subscriptions = self.version_5 and bool(getattr(properties, "SharedSubscriptionAvailable", 1))

    def _on_disconnect(self, _c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        self._ended = str(reason)


def make_client(version: MQTTProtocolVersion, client_id: str, *, transport: str, lasting: bool) -> PahoClient:
    """A client that acknowledges a message when it has been dealt with; if `lasting`, the broker keeps its session."""
    extra: dict[str, Any] = {} if version == MQTTProtocolVersion.MQTTv5 else {"clean_session": not lasting}
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


def _failure(code: int) -> str | None:
    return f"reason code 0x{code:02x}" if code >= 0x80 else None

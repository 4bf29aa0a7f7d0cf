"""MQTT by paho: version 5 where the broker has it, 3.1.1 otherwise, same payloads on both.

Persistent sessions and QoS 1 shorten the way back after a cut, but nothing relies on the broker's memory.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from random import Random, SystemRandom
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgetrain.protocol.blobs import DEFAULT_CHUNK_BYTES, HEADER_BYTES, MIN_CHUNK_BYTES, Blob
from edgetrain.protocol.errors import TransportError
from edgetrain.protocol.transport.address import parse_broker
from edgetrain.protocol.transport.base import Connected, Disconnected, Event, Received
from edgetrain.protocol.transport.connection import PACKET_OVERHEAD_BYTES, RECEIVE_MAXIMUM, Connection, make_client
from edgetrain.protocol.transport.outgoing import Control, Outgoing, Piece
from edgetrain.protocol.transport.pacing import Backoff
from edgetrain.protocol.transport.packets import Publish
from edgetrain.protocol.transport.tls import tls_context

__all__ = ["BrokerConfig", "MqttTransport", "parse_broker"]

logger = logging.getLogger(__name__)

# A CONNACK later than this is a broker that does not speak our language.
CONNACK_SECONDS = 5.0
# How long a close waits for the broker to take what is queued.
FLUSH_SECONDS = 5.0
_GOODBYE_SECONDS = 1.0
# While enough messages wait here, those that come are left to the kernel for so long: one call fetches them all, where
# each would wake a thread that competes with the one that handles them.
_SATED_SECONDS = 0.02
# Who deals with the messages of many lets so much time pass between two looks, so that some come at once. A client gets
# few: to it, a rest would be another wake-up.
_REST_SECONDS = 0.005


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is and how to be let in."""

    host: Annotated[str, Meta(description="host name or address of the MQTT broker")] = "localhost"
    port: Annotated[int, Meta(description="its port", ge=1, le=65535)] = 1883
    transport: Annotated[
        Literal["tcp", "websockets"], Meta(description="websockets for brokers behind a web server, mostly on port 443")
    ] = "tcp"
    path: Annotated[str, Meta(description="path of the WebSocket", pattern="^/")] = "/mqtt"
    username: Annotated[str, Meta(description="user name, if the broker asks for one")] = ""
    password: Annotated[str, Meta(description="password, if the broker asks for one")] = ""
    tls_ca: Annotated[
        str, Meta(description="file with the CA of the broker's certificate, its PEM text, or system; turns TLS on")
    ] = ""
    tls_certificate: Annotated[
        str, Meta(description="file with the certificate to connect with, if the broker asks for one, or its PEM text")
    ] = ""
    tls_key: Annotated[str, Meta(description="file with that certificate's private key, or its PEM text")] = ""
    mqtt_version: Annotated[
        Literal["auto", "5", "3.1.1"], Meta(description="MQTT version; auto tries 5, then 3.1.1")
    ] = "auto"
    # A phone's radio wakes up for each; a carrier forgets a silent connection after some minutes.
    keepalive_seconds: Annotated[int, Meta(description="seconds between keepalives", ge=5, le=65535)] = 120
    stall_seconds: Annotated[
        float, Meta(description="reconnect if the broker acknowledges nothing for so long", gt=0)
    ] = 30.0
    upload_kbit: Annotated[float, Meta(description="most kbit/s of blobs to send; 0 for no cap", ge=0)] = 0.0
    download_kbit: Annotated[float, Meta(description="most kbit/s of blobs to ask for; 0 for no cap", ge=0)] = 0.0
    max_packet_bytes: Annotated[
        int, Meta(description="largest packet that the broker takes; 0: what an MQTT 5 broker says", ge=0)
    ] = 0
    will_delay_seconds: Annotated[
        int, Meta(description="MQTT 5: a connection may be lost for so long before others hear of it", ge=0, le=3600)
    ] = 5
    connect_timeout_seconds: Annotated[
        float, Meta(description="give up if the broker does not answer for so long at the start", ge=0)
    ] = 30.0

    def __repr__(self) -> str:
        """Without password and key: this may end in a log."""
        return f"BrokerConfig(host={self.host!r}, port={self.port}, username={self.username!r})"


class MqttTransport:
    """A connection to an MQTT broker, made anew whenever it is lost.

    Args:
        config: where to.
        client_id: MQTT client id; the broker keeps one session per id.
        will: (topic, payload) that the broker publishes if the connection is lost.
        random: jitters the attempts to reconnect.
        lasting: whether the broker keeps our session while we are away.
        most_received: messages that the broker may send ahead of their acknowledgements, where it speaks MQTT 5.

    Raises:
        TransportError: no broker there within the timeout, or it refused us.
    """

    def __init__(
        self,
        config: BrokerConfig,
        *,
        client_id: str,
        will: tuple[str, bytes] | None = None,
        random: Random | None = None,
        lasting: bool = True,
        most_received: int = RECEIVE_MAXIMUM,
    ) -> None:
        self._lasting = lasting
        self._most_received = most_received
        # Messages that are acknowledged, or wait to be received, at a time.
        self._some = max(most_received // 4, 1)
        self._rest = _REST_SECONDS if most_received > RECEIVE_MAXIMUM else 0.0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._config = config
        self._client_id = client_id
        self._will = will
        # With each message, what acknowledges it: (connection, packet id).
        self._events: queue.SimpleQueue[tuple[Event, tuple[Connection, int] | None]] = queue.SimpleQueue()
        # Guards all that follows but the connection, which belongs to the network's thread.
        self._lock = threading.RLock()
        self._outgoing = Outgoing(rate=config.upload_kbit * 125)
        self._subscriptions: dict[str, int] = {}
        # (topic, QoS or None to unsubscribe, what waits for the confirmation).
        self._requests: deque[tuple[str, int | None, threading.Event]] = deque()
        self._confirmations: dict[int, threading.Event] = {}
        self._acknowledgements: deque[tuple[Connection, int]] = deque()
        # The request that renews the subscriptions after a reconnect, until it is confirmed.
        self._renewal: int | None = None
        self._online = True
        self._closing = threading.Event()
        self._backoff = Backoff(random or SystemRandom())
        self._connection = self._open()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._woken = False
        # Enough messages wait to be received: the network's thread reads no more for a moment.
        self._sated = False
        # Messages are published that can go by one call into the network.
        self._together = False
        self._events.put((Connected(), None))
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)
        self._thread.start()

    @property
    def version(self) -> str:
        """The MQTT version in use, "5" or "3.1.1"."""
        return "5" if self._connection.version_5 else "3.1.1"

    @property
    def shares_subscriptions(self) -> bool:
        """Whether the broker spreads the messages of a `$share/…` topic over its subscribers."""
        return self._connection.shares_subscriptions

    def subscribe(self, topic: str, *, qos: Literal[0, 1] = 1) -> None:
        """See `Transport`."""
        if topic in self._subscriptions:
            return
        done = threading.Event()
        with self._lock:
            self._subscriptions[topic] = qos
            if not self._online:
                return
            self._requests.append((topic, qos, done))
        self._wake()
        done.wait(CONNACK_SECONDS)

    def unsubscribe(self, topic: str) -> None:
        """See `Transport`."""
        with self._lock:
            if self._subscriptions.pop(topic, None) is not None and self._online:
                self._requests.append((topic, None, threading.Event()))
        self._wake()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, transient: bool = False) -> None:
        """See `Transport`."""
        with self._lock:
            if transient and not self._online:
                return
            self.bytes_sent += len(payload)
            self._outgoing.put(Control(topic, payload, retain, transient))
        if not self._together:
            self._wake()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """See `Transport`."""
        self._together = True
        try:
            yield
        finally:
            self._together = False
            self._wake()

    def send_blob(
        self,
        topic: str,
        blob: Blob,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        chunk_bytes: int = 0,
        resend: bool = True,
    ) -> None:
        """See `Transport`."""
        with self._lock:
            self._outgoing.put_blob(topic, blob, ranges, chunk_bytes, resend=resend)
        self._wake()

    def forget_blob(self, digest: bytes) -> None:
        """See `Transport`."""
        with self._lock:
            self._outgoing.forget_blob(digest)

    def receive(self, timeout: float) -> Event | None:
        """See `Transport`."""
        try:
            event, acknowledgement = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if acknowledgement is not None:
            # The broker sends no more than a few messages ahead of this: what waits here is bounded.
            self._acknowledgements.append(acknowledgement)
        # Some at a time, while there is more to do here; the last of them at once.
        if len(self._acknowledgements) >= self._some or (
            (self._acknowledgements or self._sated) and self._events.empty()
        ):
            self._wake()
        return event

    def deliver(self, event: Event) -> None:
        """See `Transport`."""
        self._events.put((event, None))

    def close(self) -> None:
        """See `Transport`."""
        if self._closing.is_set():
            return
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._online and not self._outgoing.empty and time.monotonic() < deadline:
            time.sleep(0.005)
        self._closing.set()
        self._wake()
        self._thread.join(_GOODBYE_SECONDS)
        while self._thread.is_alive():
            # It waits for a broker that does not answer.
            self._connection.client.interrupt()
            self._thread.join(_GOODBYE_SECONDS)
        self._wake_read.close()
        self._wake_write.close()

    # --- connecting ----------------------------------------------------------------------------------

    def _open(self) -> Connection:
        config = self._config
        deadline = time.monotonic() + config.connect_timeout_seconds
        versions = {
            "auto": [MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311],
            "5": [MQTTProtocolVersion.MQTTv5],
            "3.1.1": [MQTTProtocolVersion.MQTTv311],
        }[config.mqtt_version]
        backoff = Backoff(self._backoff.random, first=0.4, most=5.0)
        while True:
            for version in versions:
                outcome = self._try(version)
                if isinstance(outcome, Connection):
                    number = "5" if version == MQTTProtocolVersion.MQTTv5 else "3.1.1"
                    logger.info("connected to %s:%d by MQTT %s", config.host, config.port, number)
                    return outcome
                if refusal := _refusal(outcome):
                    raise TransportError(
                        f"the MQTT broker at {config.host}:{config.port} refused user {config.username!r}: {refusal}"
                    )
            delay = backoff.next()
            if time.monotonic() + delay > deadline:
                raise TransportError(
                    f"cannot reach the MQTT broker at {config.host}:{config.port}: {outcome}. "
                    "Is it running, and are host and port right?"
                )
            logger.warning("broker %s:%d: %s; trying again", config.host, config.port, outcome)
            time.sleep(delay)

    def _try(self, version: MQTTProtocolVersion) -> Connection | str:
        """One attempt: a connection that stands, or why not."""
        config = self._config
        client = make_client(version, self._client_id, transport=config.transport, lasting=self._lasting)
        client.ws_set_options(path=config.path)
        if config.username:
            client.username_pw_set(config.username, config.password or None)
        if config.tls_ca:
            context = tls_context(ca=config.tls_ca, certificate=config.tls_certificate, key=config.tls_key)
            client.tls_set_context(context)
        if self._will:
            client.will_set(*self._will, qos=1, properties=self._will_properties(version))
        connection = Connection(
            client,
            lasting=self._lasting,
            most_received=self._most_received,
            on_message=lambda message: self._on_message(connection, message),
            on_acknowledged=self._on_acknowledged,
            on_subscribed=self._on_subscribed,
        )
        # A close from another thread finds what to interrupt.
        self._connection = connection
        failure = connection.open(config.host, config.port, keepalive=config.keepalive_seconds, timeout=CONNACK_SECONDS)
        if failure is not None:
            return failure
        limit = min(filter(None, (connection.max_packet_bytes, config.max_packet_bytes)), default=0)
        with self._lock:
            self._outgoing.max_messages = connection.receive_maximum
            self._outgoing.max_payload = DEFAULT_CHUNK_BYTES + HEADER_BYTES
            self._outgoing.max_message = max(limit - PACKET_OVERHEAD_BYTES, 0)
            if limit:
                self._outgoing.max_payload = min(self._outgoing.max_payload, limit - PACKET_OVERHEAD_BYTES)
        if self._outgoing.max_payload < MIN_CHUNK_BYTES + HEADER_BYTES:
            connection.client.disconnect()
            connection.client.release()
            raise TransportError(
                f"the MQTT broker at {config.host}:{config.port} takes packets of at most {limit} bytes, "
                f"needed are {MIN_CHUNK_BYTES + HEADER_BYTES + PACKET_OVERHEAD_BYTES}"
            )
        return connection

    def _will_properties(self, version: MQTTProtocolVersion) -> Properties | None:
        """A phone that changes from one network to another is not gone."""
        if version != MQTTProtocolVersion.MQTTv5:
            return None
        properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
        properties.WillDelayInterval = self._config.will_delay_seconds
        return properties

    # --- the network's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        version = MQTTProtocolVersion(self._connection.client.protocol)
        told = ""
        while True:
            try:
                reason = self._serve(self._connection)
            except Exception as error:
                # What a broker sends may upset paho; that costs the connection, not the thread.
                logger.exception("broker %s:%d", self._config.host, self._config.port)
                reason = f"{type(error).__name__}: {error}"
            if self._closing.is_set():
                self._connection.close(_GOODBYE_SECONDS)
                return
            self._lost(reason)
            while True:
                if self._closing.wait(self._backoff.next()):
                    return
                try:
                    outcome = self._try(version)
                except TransportError as error:
                    outcome = str(error)
                if isinstance(outcome, Connection):
                    break
                logger.debug("reconnecting to %s:%d: %s", self._config.host, self._config.port, outcome)
                if (refusal := _refusal(outcome)) and refusal != told:
                    # It may be let in again: so it goes on trying.
                    told = refusal
                    logger.error("broker %s:%d refuses us: %s", self._config.host, self._config.port, refusal)
            self._regained(outcome)

    def _serve(self, connection: Connection) -> str:
        """Works until the connection is lost or we are to close; why."""
        while not self._closing.is_set():
            # Before looking at what there is: what comes after this wakes again.
            self._woken = False
            with self._lock:
                now = time.monotonic()
                self._feed(connection, now)
                patience = self._outgoing.wait(now)
                oldest = self._outgoing.oldest
            # Never twice in a row, so that the broker is heard. Set before the queue is looked at: whoever empties it
            # after that sees this, and wakes us.
            self._sated = not self._sated
            self._sated = self._sated and self._events.qsize() >= self._some
            wait = min(1.0 if patience is None else max(patience, 0.001), _SATED_SECONDS if self._sated else 1.0)
            reason = connection.pump(self._wake_read, wait, reading=not self._sated, rest=self._rest)
            if reason is not None:
                return reason
            quiet = 0.0 if oldest is None else time.monotonic() - max(oldest, connection.heard_at)
            if quiet > self._config.stall_seconds:
                return f"nothing acknowledged for {self._config.stall_seconds:.0f} s"
        return "closed"

    def _feed(self, connection: Connection, now: float) -> None:
        while self._requests:
            topic, qos, done = self._requests.popleft()
            if qos is None:
                connection.client.unsubscribe(topic)
            elif (mid := connection.subscribe([(topic, qos)])) is not None:
                self._confirmations[mid] = done
        while self._acknowledgements:
            of, packet = self._acknowledgements.popleft()
            if of is connection:
                connection.acknowledge(packet)
        while (what := self._outgoing.next(now)) is not None:
            if isinstance(what, Piece):
                self.bytes_sent += len(what.payload)
            self._outgoing.sent(connection.publish(what), what, now)
        connection.flush()

    def _lost(self, reason: str) -> None:
        self._connection.client.release()
        with self._lock:
            self._online = False
            self._outgoing.connection_lost()
            for done in (*self._confirmations.values(), *(done for _, _, done in self._requests)):
                done.set()
            self._confirmations.clear()
            self._requests.clear()
            self._renewal = None
        self._events.put((Disconnected(reason), None))

    def _regained(self, connection: Connection) -> None:
        self._backoff.reset()
        with self._lock:
            self._online = True
            topics = list(self._subscriptions.items())
            self._renewal = connection.subscribe(topics) if topics else None
            if self._renewal is None:
                self._events.put((Connected(), None))

    def _on_message(self, connection: Connection, message: Publish) -> None:
        self.bytes_received += len(message.payload)
        acknowledgement = (connection, message.packet) if message.qos else None
        self._events.put((Received(message.topic, message.payload), acknowledgement))

    def _on_acknowledged(self, mid: int, failure: str | None) -> None:
        if failure is not None:
            logger.warning("the broker did not take a message: %s", failure)
        with self._lock:
            self._outgoing.acknowledged(mid, time.monotonic())

    def _on_subscribed(self, mid: int) -> None:
        with self._lock:
            if mid == self._renewal:
                self._renewal = None
                self._events.put((Connected(), None))
            if (done := self._confirmations.pop(mid, None)) is not None:
                done.set()

    def _wake(self) -> None:
        # Once is enough until the network's thread has looked: a call into the kernel also gives the interpreter away.
        if self._woken:
            return
        self._woken = True
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"x")


def _refusal(outcome: str) -> str | None:
    """Why the broker will not have us, with the remedy; None for what may pass by itself."""
    said = outcome.lower().replace("_", " ")
    if "certificate revoked" in said:
        return (
            "its certificate was revoked. If that was not meant, or the device was enrolled anew: whoever runs the "
            "federation makes it a new device file (edgetrain enroll NAME --renew), to be copied here"
        )
    if "authoriz" in said or "user name" in said:
        return f"{outcome}. Unknown, revoked or enrolled anew: it needs a device file that is in force"
    return None

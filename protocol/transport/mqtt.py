"""MQTT by paho: version 5 where the broker has it, 3.1.1 otherwise, same payloads on both.

Persistent sessions and QoS 1 shorten the way back after a cut, but nothing relies on the broker's memory.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import queue
import re
import threading
import time
from typing import Annotated, Any, Literal

import msgspec
import paho.mqtt.client as paho
from msgspec import Meta
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgetrain.protocol.errors import TransportError
from edgetrain.protocol.transport.base import Connected, Disconnected, Event, Received
from edgetrain.protocol.transport.tls import tls_context

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"(?:(?P<name>[^][:/\s]+)|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?")

# How long the broker keeps a session (and its queue) of somebody who is away.
SESSION_EXPIRY_SECONDS = 3600
# A CONNACK later than this is a broker that does not speak our language.
CONNACK_SECONDS = 5.0
# Enough to hide the round trip on a fast link, small enough for a phone's memory at 60 KiB each.
INFLIGHT_MESSAGES = 20
# How long a close waits for the broker to take what is queued.
FLUSH_SECONDS = 5.0


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is and how to be let in."""

    host: Annotated[str, Meta(description="host name or address of the MQTT broker")] = "localhost"
    port: Annotated[int, Meta(description="its port", ge=1, le=65535)] = 1883
    username: Annotated[str, Meta(description="user name, if the broker asks for one")] = ""
    password: Annotated[str, Meta(description="password, if the broker asks for one")] = ""
    tls_ca: Annotated[
        str, Meta(description="file with the CA of the broker's certificate, or its PEM text; turns TLS on")
    ] = ""
    tls_certificate: Annotated[
        str, Meta(description="file with the certificate to connect with, if the broker asks for one, or its PEM text")
    ] = ""
    tls_key: Annotated[str, Meta(description="file with that certificate's private key, or its PEM text")] = ""
    mqtt_version: Annotated[
        Literal["auto", "5", "3.1.1"], Meta(description="MQTT version; auto tries 5, then 3.1.1")
    ] = "auto"
    keepalive_seconds: Annotated[int, Meta(description="seconds between keepalives", ge=5)] = 60
    connect_timeout_seconds: Annotated[
        float, Meta(description="give up if the broker does not answer for so long at the start", ge=0)
    ] = 30.0

    def __repr__(self) -> str:
        """Without password and key: this may end in a log."""
        return f"BrokerConfig(host={self.host!r}, port={self.port}, username={self.username!r})"


class _Client(paho.Client):
    def release(self, *, keep_connection: bool = False) -> None:
        """Closes the sockets that paho would leave to the garbage collector."""
        self._reset_sockets(sockpair_only=keep_connection)


class MqttTransport:
    """A connection to an MQTT broker.

    Args:
        config: where to.
        client_id: MQTT client id; the broker keeps one session per id.
        will: (topic, payload) that the broker publishes if the connection is lost.

    Raises:
        TransportError: no broker there within the timeout, or it refused us.
    """

    def __init__(self, config: BrokerConfig, *, client_id: str, will: tuple[str, bytes] | None = None) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._config = config
        self._client_id = client_id
        self._will = will
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._subscriptions: dict[str, None] = {}
        self._acknowledged: dict[int, threading.Event] = {}
        # Messages handed to paho, and those that the broker has.
        self._queued = 0
        self._delivered = 0
        self._lock = threading.Lock()
        # The request that renews the subscriptions after a reconnect, until it is confirmed.
        self._renewal: int | None = None
        self._closed = False
        self._client = self._open()

    @property
    def version(self) -> str:
        """The MQTT version in use, "5" or "3.1.1"."""
        return "5" if self._client.protocol == MQTTProtocolVersion.MQTTv5 else "3.1.1"

    def subscribe(self, topic: str) -> None:
        """See `Transport`."""
        if topic in self._subscriptions:
            return
        self._subscriptions[topic] = None
        done = threading.Event()
        with self._lock:
            result, mid = self._client.subscribe(topic, qos=1)
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
                return
            self._acknowledged[mid] = done
        done.wait(CONNACK_SECONDS)

    def unsubscribe(self, topic: str) -> None:
        """See `Transport`."""
        if topic in self._subscriptions:
            del self._subscriptions[topic]
            self._client.unsubscribe(topic)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport`."""
        self.bytes_sent += len(payload)
        self._queued += 1
        self._client.publish(topic, payload, qos=1, retain=retain)

    def receive(self, timeout: float) -> Event | None:
        """See `Transport`."""
        try:
            return self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """See `Transport`."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._client.is_connected() and self._delivered < self._queued and time.monotonic() < deadline:
            time.sleep(0.005)
        self._client.disconnect()
        self._client.loop_stop()
        self._client.release()

    # --- connecting ----------------------------------------------------------------------------------

    def _open(self) -> _Client:
        config = self._config
        deadline = time.monotonic() + config.connect_timeout_seconds
        versions = {
            "auto": [MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311],
            "5": [MQTTProtocolVersion.MQTTv5],
            "3.1.1": [MQTTProtocolVersion.MQTTv311],
        }[config.mqtt_version]
        delay = 0.2
        while True:
            for version in versions:
                outcome = self._try(version)
                if isinstance(outcome, _Client):
                    number = "5" if version == MQTTProtocolVersion.MQTTv5 else "3.1.1"
                    logger.info("connected to %s:%d by MQTT %s", config.host, config.port, number)
                    return outcome
            if time.monotonic() + delay > deadline:
                raise TransportError(
                    f"cannot reach the MQTT broker at {config.host}:{config.port}: {outcome}. "
                    "Is it running, and are host and port right?"
                )
            logger.warning("broker %s:%d: %s; trying again", config.host, config.port, outcome)
            time.sleep(delay)
            delay = min(2 * delay, 5.0)

    def _try(self, version: MQTTProtocolVersion) -> _Client | str:
        """One attempt: a connected client, or why not."""
        config = self._config
        outcome: list[str | None] = []
        client = self._make_client(version)

        def on_connect(_c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
            outcome.append(str(reason) if reason.is_failure else None)

        client.on_connect = on_connect
        deadline = time.monotonic() + CONNACK_SECONDS
        try:
            client.connect(config.host, config.port, config.keepalive_seconds, **self._session(version))
            # By hand, not by paho's thread: that one would try again by itself.
            while not outcome and time.monotonic() < deadline:
                if client.loop(0.05) != MQTTErrorCode.MQTT_ERR_SUCCESS and not outcome:
                    outcome.append("the broker closed the connection")
        except (OSError, ValueError) as error:
            client.release()
            return str(error) or type(error).__name__
        failure = outcome[0] if outcome else "it does not answer as an MQTT broker"
        if failure is None:
            self._adopt(client)
            client.release(keep_connection=True)
            client.loop_start()
            return client
        client.disconnect()
        client.release()
        if "authoriz" in failure.lower() or "user name" in failure.lower():
            raise TransportError(
                f"the MQTT broker at {config.host}:{config.port} refused user {config.username!r}: {failure}"
            )
        return failure

    def _make_client(self, version: MQTTProtocolVersion) -> _Client:
        config = self._config
        extra: dict[str, Any] = {}
        if version == MQTTProtocolVersion.MQTTv311:
            extra["clean_session"] = False
        client = _Client(CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=version, **extra)
        client.max_inflight_messages_set(INFLIGHT_MESSAGES)
        client.reconnect_delay_set(1, 30)
        if config.username:
            client.username_pw_set(config.username, config.password or None)
        if config.tls_ca:
            context = tls_context(ca=config.tls_ca, certificate=config.tls_certificate, key=config.tls_key)
            client.tls_set_context(context)
        if self._will:
            client.will_set(*self._will, qos=1)
        return client

    def _session(self, version: MQTTProtocolVersion) -> dict[str, Any]:
        if version == MQTTProtocolVersion.MQTTv311:
            return {}
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_SECONDS
        return {"clean_start": False, "properties": properties}

    def _adopt(self, client: _Client) -> None:
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        self._events.put(Connected())

    # --- paho's thread -------------------------------------------------------------------------------

    def _on_connect(self, client: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        if reason.is_failure:
            self._events.put(Disconnected(str(reason)))
            return
        topics = [(topic, 1) for topic in list(self._subscriptions)]
        self._renewal = client.subscribe(topics)[1] if topics else None
        if self._renewal is None:
            self._events.put(Connected())

    def _on_disconnect(self, _c: paho.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        with self._lock:
            for done in self._acknowledged.values():
                done.set()
            self._acknowledged.clear()
        self._events.put(Disconnected(str(reason)))

    def _on_message(self, _c: paho.Client, _u: Any, message: paho.MQTTMessage) -> None:
        self.bytes_received += len(message.payload)
        self._events.put(Received(message.topic, bytes(message.payload)))

    def _on_publish(self, _c: paho.Client, _u: Any, _mid: int, _r: Any, _p: Any) -> None:
        self._delivered += 1

    def _on_subscribe(self, _c: paho.Client, _u: Any, mid: int, _r: Any, _p: Any) -> None:
        if mid == self._renewal:
            self._renewal = None
            self._events.put(Connected())
        with self._lock, contextlib.suppress(KeyError):
            self._acknowledged.pop(mid).set()


def parse_broker(address: str) -> tuple[str, int]:
    """(host, port) of "HOST", "HOST:PORT" or "[IPv6]:PORT"; the port is 1883 if left out.

    Raises:
        TransportError: neither.
    """
    if address.count(":") > 1 and "[" not in address:
        address = f"[{address}]"  # a bare IPv6 address
    found = _ADDRESS.fullmatch(address)
    port = int(found["port"] or 1883) if found else 0
    if not found or not 0 < port < 65536:
        raise TransportError(f"broker {address!r} is not HOST or HOST:PORT")
    if found["ipv6"]:
        try:
            ipaddress.IPv6Address(found["ipv6"])
        except ValueError as error:
            raise TransportError(f"broker {address!r} is not HOST or HOST:PORT: {error}") from error
    return found["name"] or found["ipv6"], port

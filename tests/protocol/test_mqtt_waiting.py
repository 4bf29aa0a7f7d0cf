"""Messages and wills that wait, at a real broker and here."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from edgetrain.coordinator.broker import Mosquitto, find_mosquitto, free_port
from edgetrain.protocol.transport import Connected, Disconnected
from edgetrain.protocol.transport import connection as connections
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport
from support.brokers import next_event, received

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture
def connect():
    broker = Mosquitto(free_port())
    made = []

    def make(name, *, will=None, **settings):
        transport = MqttTransport(
            BrokerConfig(host="127.0.0.1", port=broker.port, **settings), client_id=name, will=will
        )
        made.append(transport)
        assert transport.receive(5) == Connected()
        return transport

    yield make
    for transport in made:
        transport.close()
    broker.stop()


def coming_back(when):
    """In place of a `Backoff`: nobody tries again before `when`."""
    return SimpleNamespace(next=lambda: 0.0 if when.wait(30) else 1.0, reset=lambda: None)


@pytest.mark.parametrize(("version", "waits"), [("5", False), ("3.1.1", True)])
def test_a_message_that_has_waited_too_long_is_not_delivered(connect, monkeypatch, version, waits):
    """MQTT 5: its expiry passes while its receiver is away. 3.1.1 knows no such thing: the control."""
    away = connect("away", mqtt_version=version)
    away.subscribe("t")
    sender = connect("sender", mqtt_version=version)
    # Gone without a word, as a phone in a tunnel; the broker keeps its session.
    back = threading.Event()
    away._backoff = coming_back(back)
    away._connection.client.interrupt()
    monkeypatch.setattr(connections, "MESSAGE_EXPIRY_SECONDS", 1)
    sender.publish("t", b"stale")
    while not sender._outgoing.empty:
        time.sleep(0.01)
    monkeypatch.setattr(connections, "MESSAGE_EXPIRY_SECONDS", 3600)
    sender.publish("t", b"fresh")
    # The broker has it for longer than its second, which it counts in whole ones.
    time.sleep(2.5)
    back.set()
    expected = [("t", b"stale"), ("t", b"fresh")] if waits else [("t", b"fresh")]
    assert received(away, len(expected)) == expected


def test_messages_that_nobody_takes_wait_and_the_link_stays(connect):
    """More than the network's thread fetches ahead; it goes on hearing the broker, or the link would count as dead."""
    reader, sender = connect("reader", stall_seconds=0.3), connect("sender")
    reader.subscribe("t")
    messages = [("t", str(number).encode()) for number in range(500)]
    for topic, payload in messages:
        sender.publish(topic, payload)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        reader.publish("elsewhere", b"something to be acknowledged")
        time.sleep(0.01)
    assert reader._events.qsize() <= 64, "what is not acknowledged is bounded"
    assert received(reader, len(messages)) == messages
    while not reader._outgoing.empty:
        time.sleep(0.01)
    assert reader.receive(0) is None, "never disconnected"


def test_a_will_waits_for_those_who_come_back(connect):
    listener = connect("listener")
    listener.subscribe("wills")
    phone = connect("phone", will=("wills", b"phone"), will_delay_seconds=30)
    gone = connect("gone", will=("wills", b"gone"), will_delay_seconds=1)
    back, never = threading.Event(), threading.Event()
    phone._backoff, gone._backoff = coming_back(back), coming_back(never)
    started = time.monotonic()
    for transport in (phone, gone):
        transport._connection.client.interrupt()
        next_event(transport, Disconnected)
    back.set()
    next_event(phone, Connected)
    assert received(listener, 1) == [("wills", b"gone")]
    assert time.monotonic() - started > 0.5, "after its delay"
    # Nothing of the phone's came before, and nothing does.
    assert listener.receive(0.5) is None
    never.set()

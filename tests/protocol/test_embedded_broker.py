"""The embedded broker leaves nothing behind: no sockets, no threads, no messages for a later test to trip over."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import threading

import pytest
from amqtt.broker import Broker

from edgetrain.coordinator.broker import EmbeddedBroker, free_port
from edgetrain.protocol.transport import mqtt
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport
from support.brokers import received


@pytest.fixture
def collected(monkeypatch):
    """What the garbage collector complained about."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: complaints.append((event.exc_value, event.object)))
    return complaints


def test_many_brokers_come_and_go_and_nothing_is_left_to_the_garbage_collector(collected, monkeypatch, caplog):
    monkeypatch.setattr(mqtt, "FLUSH_SECONDS", 0.1)
    threads = threading.active_count()
    for number in range(8):
        broker = EmbeddedBroker(free_port())
        config = BrokerConfig(host="127.0.0.1", port=broker.port, mqtt_version="3.1.1")
        transports = [MqttTransport(config, client_id=f"client-{i}", will=("wills", b"gone")) for i in range(3)]
        transports[0].subscribe("#")
        transports[1].publish("bulk", bytes(60_000))
        # Those who have not said yet who they are, those whose link was cut, and one who left properly.
        strangers = [socket.create_connection(("127.0.0.1", broker.port)) for _ in range(2)]
        transports[2]._connection.client.interrupt()
        if number % 2:
            transports[1].close()
        broker.stop()
        for stranger in strangers:
            stranger.close()
        for transport in transports:
            transport.close()
        del broker, transports, strangers
        gc.collect()
    assert collected == []
    assert threading.active_count() == threads
    assert "Traceback" not in caplog.text


def test_what_it_has_acknowledged_is_delivered_though_the_sender_leaves_at_once(monkeypatch):
    """It acknowledges before it delivers; on a slow machine the sender has gone by then."""
    deliver = Broker._handle_message_delivery

    async def slowly(*arguments):
        await asyncio.sleep(0.002)
        return await deliver(*arguments)

    monkeypatch.setattr(Broker, "_handle_message_delivery", slowly)
    broker = EmbeddedBroker(free_port())
    config = BrokerConfig(host="127.0.0.1", port=broker.port, mqtt_version="3.1.1")
    listener = MqttTransport(config, client_id="listener")
    listener.subscribe("bulk")
    payloads = [number.to_bytes(4, "big") for number in range(100)]
    speaker = MqttTransport(config, client_id="speaker")
    for payload in payloads:
        speaker.publish("bulk", payload)
    speaker.close()
    try:
        assert sorted(payload for _, payload in received(listener, 100)) == payloads
    finally:
        listener.close()
        broker.stop()

"""What MQTT does on real links: limits of the broker, aliases, caps, stalls, sessions. With a real mosquitto."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import threading
import time

import pytest

from edgetrain.coordinator.broker import Mosquitto, find_mosquitto, free_port
from edgetrain.protocol.blobs import HEADER_BYTES, Assembler, Blob, parse_chunk
from edgetrain.protocol.errors import TransportError
from edgetrain.protocol.transport import Connected, Disconnected, Received
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport
from support.brokers import WatchedBlob, next_event, received
from support.mqtt_frames import kind_of
from support.processes import wait_for
from support.proxy import FaultProxy

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
VERSIONS = ["5", "3.1.1"]


@pytest.fixture
def start():
    """Starts brokers and connects to them; closes everything."""
    opened = []

    def start(settings=""):
        broker = Mosquitto(free_port(), settings=settings)
        opened.append(broker.stop)
        return broker

    def connect(port, name="client", **settings):
        transport = MqttTransport(BrokerConfig(host="127.0.0.1", port=port, **settings), client_id=name)
        opened.append(transport.close)
        assert transport.receive(5) == Connected()
        return transport

    start.connect = connect
    yield start
    for close in reversed(opened):
        close()


@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_fit_into_the_packets_that_the_broker_takes(start, version):
    broker = start("max_packet_size 3000\n")
    listener = start.connect(broker.port, "listener", mqtt_version=version, max_packet_bytes=3000)
    speaker = start.connect(broker.port, "speaker", mqtt_version=version,
                            max_packet_bytes=0 if version == "5" else 3000)  # fmt: skip
    listener.subscribe("blob", qos=0)
    blob = Blob(random.Random(1).randbytes(50_000))
    speaker.send_blob("blob", blob)
    assembled = Assembler(blob.ref, limit=50_000)
    sizes = []
    while not assembled.complete:
        payload = next_event(listener, Received).payload
        sizes.append(len(payload))
        assembled.add(parse_chunk(payload))
    assert max(sizes) == 3000 - 256, "the packet's header, topic and properties have room"
    assembled.finish()
    # One that is too large costs itself only, not the connection.
    speaker.publish("blob", bytes(5000))
    speaker.publish("blob", b"small")
    assert received(listener, 1) == [("blob", b"small")]


def test_a_broker_for_tiny_packets_is_refused(start):
    broker = start("max_packet_size 1200\n")
    with pytest.raises(TransportError, match="packets of at most 1200 bytes, needed are 1340"):
        start.connect(broker.port)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_topic_is_written_once_where_the_broker_has_aliases_also_after_a_cut(start, version):
    broker = start()
    with_topic, chunks = [], []
    topic = b"a/long/topic/for/many/chunks"

    def watch(way, packet):
        if way == "up" and kind_of(packet) == "chunk":
            chunks.append(packet)
            with_topic.append(topic in packet)

    with FaultProxy(broker.port, watch=watch) as proxy:
        listener = start.connect(broker.port, "listener")
        listener.subscribe("a/#")
        speaker = start.connect(proxy.port, "speaker", mqtt_version=version)
        for number in range(2):
            blob = Blob(bytes([number]) * 20_000)
            speaker.send_blob(topic.decode(), blob, chunk_bytes=1000)
            assert [name for name, _ in received(listener, 20)] == [topic.decode()] * 20
            while not speaker._outgoing.empty:
                time.sleep(0.01)
            if number == 0:
                proxy.cut()
                next_event(speaker, Connected)
        assert len(chunks) == 40
        assert sum(with_topic) == (2 if version == "5" else 40)
        expiry = b"\x02" + (120).to_bytes(4, "big")
        assert all((expiry in chunk) == (version == "5") for chunk in chunks)
        speaker.close()


def test_a_cap_slows_blobs_down_and_not_messages(start):
    broker = start()
    listener = start.connect(broker.port, "listener")
    listener.subscribe("#", qos=0)
    speaker = start.connect(broker.port, "speaker", upload_kbit=400)  # 50 kB/s
    started = time.monotonic()
    blob = WatchedBlob(bytes(100_000), 25_000, lambda: speaker.publish("message", b""))
    speaker.send_blob("blob", blob)
    blob_bytes, before_message = 0, None
    while blob_bytes < 100_000 or before_message is None:
        event = next_event(listener, Received)
        if event.topic == "message":
            before_message = blob_bytes
        else:
            blob_bytes += len(event.payload) - HEADER_BYTES
    assert time.monotonic() - started > 1.5
    assert before_message < 75_000


@pytest.mark.parametrize("version", VERSIONS)
def test_a_link_that_says_nothing_is_given_up_before_the_keepalive_notices(start, version):
    broker = start()
    transport = start.connect(broker.port, mqtt_version=version, stall_seconds=0.5)
    transport.subscribe("t")
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        transport.publish("t", b"x")
        assert "nothing acknowledged" in next_event(transport, Disconnected).reason
        assert time.monotonic() - started < 15
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    # Twice if the broker took it before it was stopped.
    assert received(transport, 1) == [("t", b"x")]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_broker_keeps_messages_for_those_who_are_away_but_no_chunks(start, version):
    broker = start()
    with FaultProxy(broker.port) as proxy:
        listener = start.connect(proxy.port, "listener", mqtt_version=version)
        listener.subscribe("message")
        listener.subscribe("blob", qos=0)
        speaker = start.connect(broker.port, "speaker", mqtt_version=version)
        proxy.closed_road = True
        proxy.cut()
        next_event(listener, Disconnected)
        speaker.subscribe("echo")
        speaker.publish("message", b"kept")
        speaker.send_blob("blob", Blob(b"asked for again"))
        speaker.publish("echo", b"the broker has it all")
        received(speaker, 1)
        proxy.closed_road = False
        assert received(listener, 1) == [("message", b"kept")]
        speaker.publish("message", b"later")
        assert received(listener, 1) == [("message", b"later")]
        listener.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_nobody_looks_at_yet_waits_at_the_broker(start, version):
    """64 messages of 60 kB are here, whatever the sender does: memory is bounded."""
    broker = start()
    listener = start.connect(broker.port, "listener", mqtt_version=version)
    listener.subscribe("t")
    speaker = start.connect(broker.port, "speaker", mqtt_version=version)
    for number in range(300):
        speaker.publish("t", number.to_bytes(2, "big") + bytes(60_000))
    speaker.subscribe("echo")
    speaker.publish("echo", b"")
    received(speaker, 1)
    wait_for(lambda: listener._events.qsize() >= 64, "as many as may be here")
    # Confirmed on the same connection, after whatever else the broker would have sent.
    listener.subscribe("more")
    assert listener._events.qsize() == 64
    assert [payload[:2] for _, payload in received(listener, 300)] == [n.to_bytes(2, "big") for n in range(300)]


@pytest.mark.parametrize(
    "junk", [b"\x30\x01\x00", b"\x32\x03\xff\xff\x00", b"\x90\x00", b"\x00\x00", b"\xf0\xff\xff\xff\xff\xff"]
)
def test_a_broker_that_sends_junk_is_left_and_tried_again(junk):
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    connection.recv(1000)
                    connection.sendall(b"\x20\x02\x00\x00" + (junk if len(connections) == 1 else b""))

        serving = threading.Thread(target=serve)
        serving.start()
        transport = MqttTransport(
            BrokerConfig(host="127.0.0.1", port=server.getsockname()[1], mqtt_version="3.1.1"), client_id="test"
        )
        try:
            next_event(transport, Disconnected)
            next_event(transport, Connected)
        finally:
            transport.close()
            server.shutdown(socket.SHUT_RDWR)
            serving.join()
            for connection in connections:
                connection.close()


# --- all at once -------------------------------------------------------------------------------------


def settle(port, clients, restart):
    """Seconds until all clients have their subscriptions back and an answer to what they said, after `restart`.

    As in a federation: who has connected says so, and once more when the server has.
    """
    topic = "from/{}/message".format
    answers = "to/{}/message".format
    config = {"mqtt_version": "3.1.1", "keepalive_seconds": 600}
    server = MqttTransport(BrokerConfig(host="127.0.0.1", port=port, **config), client_id="server")
    server.subscribe("from/+/message")
    transports = []
    for number in range(clients):
        transport = MqttTransport(
            BrokerConfig(host="127.0.0.1", port=port, **config), client_id=str(number), random=random.Random(number)
        )
        assert transport.receive(5) == Connected()
        transport.subscribe(answers(number))
        transport.subscribe("announce")
        transports.append(transport)
    assert server.receive(5) == Connected()
    answered, ended = set(), threading.Event()

    def serve():
        while not ended.is_set():
            event = server.receive(0.1)
            if isinstance(event, Received):
                server.publish(event.topic.replace("from", "to", 1), b"welcome")
            elif isinstance(event, Connected):
                server.publish("announce", b"open", retain=True)

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        restart()
        started = time.monotonic()
        while len(answered) < clients and time.monotonic() < started + 60:
            for number, transport in enumerate(transports):
                while number not in answered and (event := transport.receive(0)) is not None:
                    if isinstance(event, Received) and event.payload == b"welcome":
                        answered.add(number)
                    elif not isinstance(event, Disconnected):
                        transport.publish(topic(number), b"hello")
            time.sleep(0.01)
        seconds = time.monotonic() - started
    finally:
        ended.set()
        serving.join()
        for transport in (*transports, server):
            transport.close()
    assert len(answered) == clients
    return seconds


@pytest.mark.parametrize("clients", [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_many_clients_that_lose_their_broker_together_settle_in_ten_seconds(clients):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    port = free_port()
    broker = Mosquitto(port)

    def restart():
        nonlocal broker
        os.kill(broker.pid, signal.SIGKILL)
        broker.stop()
        broker = Mosquitto(port)

    try:
        seconds = settle(port, clients, restart)
    finally:
        broker.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"{clients} clients settled in {seconds:.1f} s")
    assert seconds <= 10

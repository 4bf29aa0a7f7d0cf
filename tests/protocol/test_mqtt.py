"""What only MQTT has: addresses, versions, passwords, TLS, and brokers that are not there."""

from __future__ import annotations

import datetime
import gc
import ipaddress
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgetrain.coordinator.broker import (
    EmbeddedBroker,
    Mosquitto,
    find_mosquitto,
    free_port,
    start_broker,
)
from edgetrain.coordinator.errors import BrokerError
from edgetrain.protocol.errors import TransportError
from edgetrain.protocol.transport import mqtt
from edgetrain.protocol.transport.address import parse_address
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport, parse_broker
from support.brokers import received

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


def connect(port, **settings):
    return MqttTransport(BrokerConfig(host="127.0.0.1", port=port, **settings), client_id="test")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("pi", ("pi", 1883)),
        ("pi:99", ("pi", 99)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[::1]:7", ("::1", 7)),
        ("[::1]", ("::1", 1883)),
        ("::1", ("::1", 1883)),
    ],
)
def test_addresses(address, expected):
    assert parse_broker(address) == expected


@pytest.mark.parametrize("address", ["", ":1", "pi:", "pi:x", "pi:0", "pi:65536", "pi:-1", "mqtt://pi:1", "pi:١"])
def test_what_is_no_address(address):
    with pytest.raises(TransportError, match="HOST or HOST:PORT"):
        parse_broker(address)


@pytest.mark.parametrize(
    ("address", "settings"),
    [
        ("pi:99", {"host": "pi", "port": 99}),
        ("mqtt://pi", {"host": "pi", "port": 1883}),
        ("mqtts://pi", {"host": "pi", "port": 8883, "tls_ca": "system"}),
        ("ws://pi:8080/a/b", {"host": "pi", "port": 8080, "transport": "websockets", "path": "/a/b"}),
        ("wss://[::1]", {"host": "::1", "port": 443, "transport": "websockets", "path": "/mqtt", "tls_ca": "system"}),
    ],
)
def test_addresses_with_a_scheme(address, settings):
    assert dict(parse_address(address).settings()) == settings


@pytest.mark.parametrize("address", ["http://pi", "ws://", "ws:///mqtt", "wss://user:word@pi", "mqtt://pi:x"])
def test_what_is_no_address_with_a_scheme(address):
    with pytest.raises(TransportError, match="HOST"):
        parse_address(address)


def test_nobody_there_is_an_error_in_bounded_time():
    port = free_port()
    started = time.monotonic()
    with pytest.raises(TransportError, match=rf"cannot reach the MQTT broker at 127\.0\.0\.1:{port}.*Is it running"):
        connect(port, connect_timeout_seconds=0.5)
    assert time.monotonic() - started < 15


def test_an_unknown_host_is_an_error():
    config = BrokerConfig(host="no-such-host.invalid", connect_timeout_seconds=0)
    with pytest.raises(TransportError, match=r"no-such-host\.invalid"):
        MqttTransport(config, client_id="test")


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 100], ids=["silent", "http", "junk"]
)
def test_something_else_at_the_port_is_an_error_in_bounded_time(answer, monkeypatch):
    monkeypatch.setattr(mqtt, "CONNACK_SECONDS", 0.3)
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            open_connections = []
            while not ended.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    break
                open_connections.append(connection)
                if answer:
                    connection.sendall(answer)
            for connection in open_connections:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        started = time.monotonic()
        try:
            with pytest.raises(TransportError, match="cannot reach the MQTT broker"):
                connect(server.getsockname()[1], connect_timeout_seconds=0.1)
        finally:
            ended.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert time.monotonic() - started < 10


@needs_mosquitto
def test_mqtt_5_where_the_broker_has_it():
    broker = Mosquitto(free_port())
    try:
        for setting, version in (("auto", "5"), ("5", "5"), ("3.1.1", "3.1.1")):
            transport = connect(broker.port, mqtt_version=setting)
            assert transport.version == version
            transport.close()
    finally:
        broker.stop()


def test_mqtt_3_where_the_broker_has_no_5(monkeypatch):
    monkeypatch.setattr(mqtt, "CONNACK_SECONDS", 0.5)  # the embedded broker leaves version 5 unanswered
    broker = EmbeddedBroker(free_port())
    try:
        transport = connect(broker.port)
        assert transport.version == "3.1.1"
        transport.subscribe("t")
        transport.publish("t", b"x")
        assert received(transport, 1) == [("t", b"x")]
        transport.close()
        with pytest.raises(TransportError):
            connect(broker.port, mqtt_version="5", connect_timeout_seconds=0)
    finally:
        broker.stop()


@needs_mosquitto
def test_the_websocket_listener_of_mosquitto_itself():
    """It delivers some ten packets a second, so there are few here; a web server in front of it is as fast as TCP."""
    port = free_port()
    broker = Mosquitto(free_port(), settings=f"listener {port} 127.0.0.1\nprotocol websockets\n")
    try:
        transport = connect(port, transport="websockets")
        assert transport.version == "5"
        transport.subscribe("t")
        payloads = [bytes([i]) * 30_000 for i in range(5)]
        for payload in payloads:
            transport.publish("t", payload)
        assert [payload for _, payload in received(transport, 5)] == payloads
        transport.close()
        with pytest.raises(TransportError, match="cannot reach"):
            connect(broker.port, transport="websockets", connect_timeout_seconds=0)
    finally:
        broker.stop()


@needs_mosquitto
def test_a_wrong_password_is_an_error_at_once(tmp_path):
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", passwords, "pi", "right"], check=True)
    passwords.chmod(0o644)
    tmp_path.chmod(0o755)
    broker = Mosquitto(free_port(), settings=f"allow_anonymous false\npassword_file {passwords}\nuser root\n")
    try:
        started = time.monotonic()
        for settings in ({"username": "pi", "password": "wrong"}, {}):
            with pytest.raises(TransportError, match="refused user"):
                connect(broker.port, **settings)
        assert time.monotonic() - started < 15
        connect(broker.port, username="pi", password="right").close()
    finally:
        broker.stop()


def authority(name):
    """A self-signed certificate for 127.0.0.1 with its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), private


@needs_mosquitto
def test_tls(tmp_path):
    tmp_path.chmod(0o755)
    for name in ("ours", "theirs"):
        certificate, key = authority(name)
        (tmp_path / f"{name}.pem").write_bytes(certificate)
        (tmp_path / f"{name}.key").write_bytes(key)
    settings = f"cafile {tmp_path}/ours.pem\ncertfile {tmp_path}/ours.pem\nkeyfile {tmp_path}/ours.key\nuser root\n"
    broker = Mosquitto(free_port(), settings=settings)
    try:
        transport = connect(broker.port, tls_ca=str(tmp_path / "ours.pem"))
        transport.subscribe("t")
        transport.publish("t", b"secret")
        assert received(transport, 1) == [("t", b"secret")]
        transport.close()
        with pytest.raises(TransportError, match="certificate"):
            connect(broker.port, tls_ca=str(tmp_path / "theirs.pem"), connect_timeout_seconds=0)
        for bad in ("none.pem", "ours.key"):
            with pytest.raises(TransportError, match=f"{bad}.*cannot be used as the broker's CA"):
                connect(broker.port, tls_ca=str(tmp_path / bad), connect_timeout_seconds=0)
    finally:
        broker.stop()
        gc.collect()


@needs_mosquitto
def test_a_broker_that_hangs_does_not_hang_us(monkeypatch):
    monkeypatch.setattr(mqtt, "CONNACK_SECONDS", 0.5)
    monkeypatch.setattr(mqtt, "FLUSH_SECONDS", 0.5)
    broker = Mosquitto(free_port())
    try:
        transport = connect(broker.port)
        os.kill(broker.pid, signal.SIGSTOP)
        started = time.monotonic()
        transport.subscribe("t")
        transport.publish("t", b"x")
        transport.close()
        assert time.monotonic() - started < 9
    finally:
        os.kill(broker.pid, signal.SIGCONT)
        broker.stop()


# --- brokers that we start ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_a_started_broker_listens_on_loopback_only_and_stops(kind):
    broker = start_broker(kind)
    transport = connect(broker.port, mqtt_version="3.1.1")
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A"]
    assert f"0100007F:{broker.port:04X}" in listening
    assert f"00000000:{broker.port:04X}" not in listening
    transport.close()
    broker.stop()
    broker.stop()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", broker.port)) != 0


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
def test_a_taken_port_is_an_error(kind):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(BrokerError, match="is taken"):
        start_broker(kind, port=server.getsockname()[1])


@needs_mosquitto
def test_a_mosquitto_that_does_not_start_says_why():
    with pytest.raises(BrokerError, match="nonsense"):
        Mosquitto(free_port(), settings="nonsense true\n")


def test_no_mosquitto_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr("edgetrain.coordinator.broker.find_mosquitto", lambda: None)
    with pytest.raises(BrokerError, match="apt install mosquitto"):
        start_broker("mosquitto")
    broker = start_broker()  # the embedded one
    assert isinstance(broker, EmbeddedBroker)
    broker.stop()

"""init, enroll, revoke: a real Mosquitto with TLS, real processes, and who is kept out."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from edgetrain.coordinator.authority import FederationDirectory
from edgetrain.coordinator.authority.broker import FederationBroker
from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.config import convert, read_toml
from edgetrain.protocol.errors import TransportError
from edgetrain.protocol.transport import Disconnected, Received
from edgetrain.protocol.transport.mqtt import MqttTransport
from support.brokers import next_event, received
from support.enrolled import EnrolledFederation, edgetrain
from support.federation import ENVIRONMENT
from support.processes import wait_for
from support.tiny_bundle import make_data

pytestmark = [
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
    # paho, after a handshake that failed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def gets_in(federation, name):
    try:
        federation.connect(name).close()
    except TransportError:
        return False
    return True


def start_client(processes, path, name):
    inputs, targets = make_data(30, seed=len(name) + ord(name[-1]))
    np.savez(path / name / "data.npz", inputs=inputs, targets=targets)
    return processes.edgetrain(
        "client", "--config", f"{name}.toml", log=path / name / "log", env=ENVIRONMENT, cwd=path / name
    )


def start_coordinator(processes, path, *settings):
    options = [part for setting in settings for part in ("--set", setting)]
    return processes.edgetrain(
        "coordinator", "--config", path / "fed/federation.toml", *options, log=path / "coordinator.log", env=ENVIRONMENT
    )


def test_a_whole_run_from_nothing_and_what_its_files_and_logs_give_away(processes, tiny_bundle, tmp_path):
    federation = EnrolledFederation(tmp_path, tiny_bundle, "a", "b")
    coordinator = start_coordinator(processes, tmp_path, "rounds.total=2")
    clients = [start_client(processes, tmp_path, name) for name in ("a", "b")]
    assert coordinator.wait() == 0, coordinator.output
    assert [client.wait() for client in clients] == [0, 0], clients[0].output + clients[1].output
    run = federation.fed / "run"
    assert json.loads((run / "summary.json").read_text())["rounds"] == 2
    # Secrets are in files that only their owner can read, and in no log.
    secrets = federation.secrets()
    assert len(secrets) >= 12
    for file in [path for path in tmp_path.rglob("*") if path.is_file()]:
        if any(secret in file.read_bytes() for secret in secrets):
            assert file.stat().st_mode & 0o077 == 0, file
            assert "log" not in file.name, file
    # The ledger is whole, agrees with what clients were told, and holds both of them.
    key = federation.device("a").coordinator_key
    seen = tmp_path / "a/state-a/checkpoints.jsonl"
    report = json.loads(edgetrain("audit", "verify", run, "--key", key, "--seen", seen, "--format", "json"))
    assert report["kinds"]["accepted"] == 4
    assert report["kinds"]["aggregated"] == 2
    assert report["compared"] >= 2
    shown = [
        json.loads(line) for line in edgetrain("audit", "show", run, "--client", "a", "--format", "json").splitlines()
    ]
    assert [record["type"] for record in shown] == ["enrolled", "invited", "accepted", "invited", "accepted"]
    log = run / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"client":"a"', b'"client":"b"', 1))
    assert "line" in edgetrain("audit", "verify", run, status=1)
    assert "do not trust the above" in edgetrain("audit", "show", run, status=1)


def test_secure_aggregation_among_enrolled_devices(processes, tiny_bundle, tmp_path):
    """With what `init` and `enroll` have written and nothing else: each checks that its neighbours are enrolled."""
    names = ("a", "b", "c")
    federation = EnrolledFederation(tmp_path, tiny_bundle, *names)
    coordinator = start_coordinator(
        processes, tmp_path, "rounds.total=1", "rounds.goal=3", "secure_aggregation.enabled=true",
        "codec=randk:0.5|int8:block=all:stochastic|packed",
    )  # fmt: skip
    clients = [start_client(processes, tmp_path, name) for name in names]
    assert coordinator.wait() == 0, coordinator.output
    assert [client.wait() for client in clients] == [0, 0, 0], clients[0].output
    assert json.loads((federation.fed / "run/rounds.jsonl").read_text())["accepted"] == 3
    proofs = {federation.device(name).enrolment for name in names}
    assert len(proofs) == 3
    assert "" not in proofs


def test_revoked_and_enrolled_while_the_run_goes_on(processes, tiny_bundle, tmp_path):
    federation = EnrolledFederation(tmp_path, tiny_bundle, "a", "b")
    settings = ("rounds.total=100000", "rounds.minimum=1", "rounds.deadline_seconds=5", "rounds.gather_seconds=2")
    coordinator = start_coordinator(processes, tmp_path, *settings)
    first, second = (start_client(processes, tmp_path, name) for name in ("a", "b"))
    rounds = federation.fed / "run/rounds.jsonl"
    wait_for(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= 2, f"two rounds {coordinator.log}")
    federation.revoke("b")
    assert second.wait() == 1
    last = second.output.splitlines()[-1]
    assert "'b' was revoked on" in last
    assert "edgetrain enroll b --renew" in last
    # A new start does not get past the broker: neither by certificate, nor by password. It says why, and what helps.
    wait_for(lambda: not gets_in(federation, "b"), "the broker to read its files again", seconds=10)
    again = start_client(processes, tmp_path, "b")
    assert again.wait() == 1
    last = again.output.splitlines()[-1]
    assert "refused user 'b': its certificate was revoked" in last
    assert "edgetrain enroll NAME --renew" in last
    # One that nobody knew when the run began.
    federation.enroll("c")
    (tmp_path / "c/c.toml").chmod(0o644)
    third = start_client(processes, tmp_path, "c")
    wait_for(lambda: "c joined" in coordinator.output, "c")
    done = rounds.read_bytes().count(b"\n")
    wait_for(lambda: rounds.read_bytes().count(b"\n") >= done + 3, "further rounds")
    assert "c.toml holds keys and can be read by others: chmod 600" in third.output
    assert "can be read by others" not in first.output
    assert first.running()
    edgetrain("runs", "stop", federation.fed / "run")
    assert coordinator.wait() == 0, coordinator.output
    assert [first.wait(), third.wait()] == [0, 0]
    edgetrain("audit", "verify", federation.fed / "run")
    lines = edgetrain("audit", "show", federation.fed / "run", "--client", "b", "--format", "json").splitlines()
    kinds = [json.loads(line)["type"] for line in lines]
    assert "accepted" not in kinds[kinds.index("revoked") :]
    assert kinds[0] == "enrolled"


# --- at the broker -----------------------------------------------------------------------------------


@pytest.fixture
def broker(tiny_bundle, tmp_path):
    """A federation of a and b whose broker runs, and nothing else."""
    federation = EnrolledFederation(tmp_path, tiny_bundle, "a", "b")
    running = FederationBroker(federation.fed, federation.port)
    yield federation, running
    running.stop()
    gc.collect()


def test_who_gets_into_the_broker(broker, tiny_bundle, tmp_path):
    federation, _ = broker
    federation.connect("a").close()
    federation.connect("a", mqtt_version="3.1.1").close()
    foreign = FederationDirectory(tmp_path / "foreign")
    edgetrain("init", foreign.path, "--host", "127.0.0.1", "--bundle", tiny_bundle)
    (tmp_path / "other").mkdir()
    foreign.enroll("a", output=tmp_path / "other", data="")
    stranger = convert(read_toml(tmp_path / "other/a.toml"), ClientConfig, where="stranger").broker
    for refused in (
        {"tls_certificate": "", "tls_key": ""},
        {"tls_certificate": stranger.tls_certificate, "tls_key": stranger.tls_key},
        {"password": stranger.password},
        {"username": "", "password": ""},
        {"username": "b"},
        {"username": "coordinator"},
        {"tls_ca": stranger.tls_ca},
        {"tls_ca": "", "tls_certificate": "", "tls_key": ""},
    ):
        with pytest.raises(TransportError):
            federation.connect("a", **refused)
    federation.connect("a").close()


def test_a_client_writes_and_reads_its_own_topics_only(broker):
    federation, _ = broker
    a, b, coordinator = (federation.connect(name) for name in ("a", "b", "coordinator"))
    coordinator.subscribe("edgetrain/fed/#")
    for topic in ("edgetrain/fed/#", "edgetrain/fed/to/b/#", "edgetrain/fed/from/#", "edgetrain/fed/all/#",
                  "edgetrain/fed/to/a/#", "#", "$SYS/#"):  # fmt: skip
        a.subscribe(topic)
    b.subscribe("edgetrain/fed/to/b/#")
    b.subscribe("edgetrain/fed/all/#")
    forbidden = ["edgetrain/fed/from/b/message", "edgetrain/fed/to/b/message", "edgetrain/fed/to/a/message",
                 "edgetrain/fed/all/announce", "edgetrain/fed/all/round", "edgetrain/other/from/a/message",
                 "edgetrain/fed/from/a/../b/message", "$SYS/broker"]  # fmt: skip
    for topic in forbidden:
        a.publish(topic, b"forbidden", retain=True)
    a.publish("edgetrain/fed/from/a/message", b"mine")
    b.publish("edgetrain/fed/from/b/message", b"of b")
    assert {topic for topic, _ in received(coordinator, 3)} >= {
        "edgetrain/fed/from/a/message", "edgetrain/fed/from/b/message"
    }  # fmt: skip
    for topic in ("to/a/message", "to/b/message", "all/announce"):
        coordinator.publish(f"edgetrain/fed/{topic}", b"hello")
    of_a = received(a, 2)
    assert {topic for topic, _ in of_a} <= {"edgetrain/fed/to/a/message", "edgetrain/fed/all/announce"}
    assert {topic for topic, _ in received(b, 2)} == {"edgetrain/fed/to/b/message", "edgetrain/fed/all/announce"}
    # A broker keeps the order: what should not come would come before this.
    coordinator.publish("edgetrain/fed/all/round", b"last")
    for transport in (a, b, coordinator):
        while (event := next_event(transport, Received)).payload != b"last":
            assert event.payload != b"forbidden" or "/from/a/" in event.topic, event
            assert transport is not a or event.topic in {"edgetrain/fed/to/a/message", "edgetrain/fed/all/announce"}
        transport.close()


def test_a_session_belongs_to_its_user(broker):
    """The client id is the broker's business: nobody takes over another's session."""
    federation, _ = broker
    b = federation.connect("b")
    b.subscribe("edgetrain/fed/to/b/#")
    thief = MqttTransport(federation.device("a").broker, client_id="test/b")
    coordinator = federation.connect("coordinator")
    coordinator.publish("edgetrain/fed/to/b/message", b"for b")
    assert received(b, 1) == [("edgetrain/fed/to/b/message", b"for b")]
    for transport in (thief, b, coordinator):
        transport.close()


def test_a_revoked_client_is_dropped_by_a_running_broker_and_enrolled_anew_comes_back(broker):
    federation, running = broker
    b, coordinator = federation.connect("b"), federation.connect("coordinator")
    old = federation.device("b").broker
    coordinator.subscribe("edgetrain/fed/#")
    b.publish("edgetrain/fed/from/b/message", b"before")
    assert received(coordinator, 1) == [("edgetrain/fed/from/b/message", b"before")]
    federation.revoke("b")
    running.reload()
    next_event(b, Disconnected)
    with pytest.raises(TransportError):
        federation.connect("b")
    b.publish("edgetrain/fed/from/b/message", b"after")
    edgetrain("enroll", "b", "--dir", federation.fed, "--output", federation.path / "b", "--renew")
    running.reload()
    fresh = federation.connect("b")
    fresh.publish("edgetrain/fed/from/b/message", b"renewed")
    assert received(coordinator, 1) == [("edgetrain/fed/from/b/message", b"renewed")]
    new = federation.device("b").broker
    for mixed in (
        {"password": old.password},
        {"tls_certificate": old.tls_certificate, "tls_key": old.tls_key},  # the list of revoked certificates
    ):
        with pytest.raises(TransportError):
            federation.connect("b", **mixed)
    assert new.tls_certificate != old.tls_certificate
    for transport in (fresh, b, coordinator):
        transport.close()

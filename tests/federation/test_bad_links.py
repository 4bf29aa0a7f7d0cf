"""Whole federations over bad links: real processes, a real mosquitto, and a proxy that is as bad as a mobile link."""

from __future__ import annotations

import threading
import tomllib

import numpy as np
import pytest
import tomli_w

from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.coordinator.run.requests import write_request
from support import tiny_bundle as tiny
from support.federation import Federation
from support.mqtt_frames import kind_of
from support.processes import wait_for
from support.proxy import FaultProxy

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

# Of the bytes of blobs, in either direction.
MOST_RETRANSMITTED = 0.03


@pytest.fixture
def wide_bundle(monkeypatch, tmp_path):
    """(path, bytes of its largest file): 25,005 parameters, so that a dense float32 update has 100 kB."""
    hidden = 2778
    monkeypatch.setattr(tiny, "HIDDEN", hidden)
    shapes = {"first.weight": (hidden, 5), "first.bias": (hidden,), "second.weight": (3, hidden), "second.bias": (3,)}
    monkeypatch.setattr(tiny, "SHAPES", shapes)
    monkeypatch.setattr(tiny, "NUM_PARAMETERS", sum(int(np.prod(shape)) for shape in shapes.values()))

    def make(size):
        return tiny.write_tiny_bundle(tmp_path / "wide", padding=size, runtimes=("onnxruntime",))

    return make


@pytest.fixture
def federate(processes, tmp_path):
    made = []

    def make(bundle, **options):
        federation = Federation(processes, tmp_path, bundle, **options)
        made.append(federation)
        return federation

    yield make
    processes.end_all()
    for federation in made:
        federation.stop_broker()


def through(federation, proxy, *names):
    """Clients reach the broker through the proxy; all of them, if none is named."""
    for name in names or federation.names:
        path = federation.path / f"{name}.toml"
        config = tomllib.loads(path.read_text())
        config["broker"] |= {"port": proxy.port}
        path.write_text(tomli_w.dumps(config))


def transfer(federate, bundle, *, rate, cut_every, version, seconds):
    """One client fetches the bundle, trains one round, and sends its update."""
    federation = federate(
        bundle, broker=version, clients=1, codec="dense|float32",
        rounds={"total": 1, "goal": 1, "minimum": 1, "deadline_seconds": 600.0, "gather_seconds": 600.0,
                "idle_timeout_seconds": 600.0},
    )  # fmt: skip
    with FaultProxy(federation.port, rate=rate, cut_every=cut_every) as proxy:
        through(federation, proxy)
        coordinator = federation.start_coordinator()
        client = federation.start_client("client-1")
        assert coordinator.wait(seconds) == 0, coordinator.output + client.output
        assert client.wait(60) == 0, client.output
    federation.check_nothing_lost_or_doubled(1)
    for way, direction in (("down", proxy.down), ("up", proxy.up)):
        account = direction.account
        print(f"{proxy.cuts} cuts, {way}: {account.distinct} bytes, {account.retransmitted:.2%} in vain")
    return proxy


def check(proxy, *, bundle_bytes, cuts):
    down, up = proxy.down.account, proxy.up.account
    assert proxy.cuts >= cuts
    # The bundle and the parameters, 100 kB.
    assert down.distinct > bundle_bytes + 100_000
    assert 100_000 < up.distinct < 101_000
    assert down.retransmitted <= MOST_RETRANSMITTED
    assert up.retransmitted <= MOST_RETRANSMITTED


def test_a_link_that_is_cut_again_and_again_costs_little(federate, wide_bundle):
    """As below, but everything is three times as quick and the bundle small."""
    bundle = wide_bundle(30_000)
    proxy = transfer(federate, bundle, rate=12_000, cut_every=10, version="mosquitto-3.1.1", seconds=120)
    check(proxy, bundle_bytes=30_000, cuts=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["mosquitto", "mosquitto-3.1.1"])
def test_two_megabytes_at_64_kbit_with_a_cut_every_30_seconds(federate, wide_bundle, version):
    bundle = wide_bundle(2_000_000)
    proxy = transfer(federate, bundle, rate=8_000, cut_every=30, version=version, seconds=800)
    check(proxy, bundle_bytes=2_000_000, cuts=8)


def test_packets_that_come_late_and_twice_change_nothing(federate, tiny_bundle):
    federation = federate(tiny_bundle, rounds={"total": 8})
    with FaultProxy(federation.port, delay=0.05, double_every=2) as proxy:
        through(federation, proxy)
        clients = federation.start_clients()
        coordinator = federation.start_coordinator()
        assert coordinator.wait() == 0, coordinator.output
        for client in clients.values():
            assert client.wait() == 0, client.output
        assert proxy.doubled > 50
    federation.check_nothing_lost_or_doubled(8)


# Every message and every chunk of a client's life. Just before it passes, the fault strikes.
PHASES = [
    ("down", "plan"), ("up", "want"), ("down", "chunk"), ("up", "offer"), ("up", "chunk"), ("down", "verdict"),
    ("down", "closed"), ("up", "hello"), ("down", "welcome"), ("up", "ready"),
]  # fmt: skip


class Ambush:
    """Waits for a packet and strikes; once each time it is laid."""

    def __init__(self):
        self.strike = lambda: None
        self._waits_for = None
        self.struck = threading.Event()

    def lay(self, way, kind):
        self.struck.clear()
        self._waits_for = (way, kind)

    def __call__(self, way, packet):
        if self._waits_for == (way, kind_of(packet)):
            self._waits_for = None
            self.strike()
            self.struck.set()


def endure(federation, coordinator, ambush, recover):
    """Goes through all phases; the run must go on after each."""
    for way, kind in PHASES:
        done = federation.rounds_done()
        federation.wait_for_rounds(done + 2, coordinator)
        if kind in {"hello", "welcome", "ready"}:
            # Said by those who come back: from the second strike on.
            ambush.lay("down", "plan")
            assert ambush.struck.wait(30), "plan"
            ambush.lay(way, kind)
            recover()
        else:
            ambush.lay(way, kind)
        assert ambush.struck.wait(30), f"{way} {kind}\n{coordinator.output[-500:]}"
        done = federation.rounds_done()
        recover()
        federation.wait_for_rounds(done + 2, coordinator)
    write_request(federation.run, "stop")
    assert coordinator.wait() == 0, coordinator.output


FOR_EVER = {"rounds": {"total": 100_000, "goal": 2, "minimum": 2, "deadline_seconds": 30.0}}


def test_a_client_killed_in_every_phase_of_a_round(federate, tiny_bundle):
    federation = federate(tiny_bundle, clients=2, **FOR_EVER)
    ambush = Ambush()
    with FaultProxy(federation.port, watch=ambush) as proxy:
        through(federation, proxy, "client-1")
        clients = federation.start_clients()
        coordinator = federation.start_coordinator()
        ambush.strike = lambda: clients["client-1"].kill()  # noqa: PLW0108
        federation.wait_for_rounds(2, coordinator)
        endure(federation, coordinator, ambush,
               lambda: clients.update({"client-1": federation.start_client("client-1")}))  # fmt: skip
        assert [client.wait() for client in clients.values()] == [0, 0]
    federation.check_nothing_lost_or_doubled(federation.rounds_done(), clients_killed=2 * len(PHASES), finished=False)


@pytest.mark.parametrize("version", ["mosquitto", pytest.param("mosquitto-3.1.1", marks=pytest.mark.slow)])
def test_a_broker_killed_in_every_phase_of_a_round(federate, tiny_bundle, version):
    federation = federate(tiny_bundle, clients=2, broker=version, **FOR_EVER)
    ambush = Ambush()
    with FaultProxy(federation.port, watch=ambush) as proxy:
        through(federation, proxy, "client-1")
        clients = federation.start_clients()
        coordinator = federation.start_coordinator()
        ambush.strike = federation.kill_broker
        endure(federation, coordinator, ambush, federation.start_broker)
        assert [client.wait() for client in clients.values()] == [0, 0]
    federation.check_nothing_lost_or_doubled(federation.rounds_done(), finished=False)


def test_whoever_is_killed_halfway_through_a_transfer_goes_on_where_it_was(federate, wide_bundle):
    """The client during the bundle, the coordinator during the update, the client during the rest of the update."""
    federation = federate(
        wide_bundle(100_000), clients=1, codec="dense|float32",
        rounds={"total": 1, "goal": 1, "minimum": 1, "deadline_seconds": 300.0, "gather_seconds": 300.0,
                "idle_timeout_seconds": 300.0},
    )  # fmt: skip
    with FaultProxy(federation.port, rate=30_000) as proxy:
        through(federation, proxy)
        down, up = proxy.down.account, proxy.up.account
        coordinator, client = federation.start_coordinator(), federation.start_client("client-1")
        wait_for(lambda: down.distinct > 60_000, "a part of the bundle")
        client.kill()
        client = federation.start_client("client-1")
        wait_for(lambda: up.distinct > 30_000, "a part of the update")
        coordinator.kill()
        coordinator = federation.start_coordinator()
        wait_for(lambda: up.distinct > 60_000, "more of the update")
        client.kill()
        client = federation.start_client("client-1")
        assert coordinator.wait() == 0, coordinator.output
        assert client.wait() == 0, client.output
        assert 100_000 < up.distinct < 101_000
        # At each kill what was on the way, a window of a second (two on the way down); the manifest; and what
        # arrived for a coordinator that was not there.
        again = [account.retransmitted * account.distinct for account in (down, up)]
        print(f"sent again: {again[0]:.0f} bytes down, {again[1]:.0f} up")
        assert again[0] < 2 * 60_000 + 10_000
        assert again[1] < 3 * 30_000
    federation.check_nothing_lost_or_doubled(1, clients_killed=2)
    assert not list((federation.run / "uploads").rglob("*"))
    assert not list((federation.path / "client-1" / "partial").glob("*"))

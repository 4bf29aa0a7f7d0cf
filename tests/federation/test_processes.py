"""Whole federations of real processes: three brokers, kills, restarts, interrupts."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from edgetrain.coordinator.broker import find_mosquitto, free_port
from support.federation import ENVIRONMENT, Federation
from support.processes import wait_for

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture
def federate(processes, tiny_bundle, tmp_path):
    made = []

    def make(bundle=tiny_bundle, **options):
        federation = Federation(processes, tmp_path, bundle, **options)
        made.append(federation)
        return federation

    yield make
    processes.end_all()
    for federation in made:
        federation.stop_broker()


def digits_shards(clients):
    from edgetrain.models.data import digits, dirichlet_split, take

    train, test = digits(seed=7)
    shards = [take(train, part) for part in dirichlet_split(train.targets, clients, 1.0, 7, min_per_client=20)]
    return [(shard.inputs, shard.targets) for shard in shards], (test.inputs, test.targets)


@pytest.mark.parametrize("broker", ["mosquitto", "mosquitto-3.1.1", "embedded"])
def test_three_clients_learn_to_read_digits(federate, digits_bundle, broker):
    pytest.importorskip("sklearn")
    shards, test = digits_shards(3)
    federation = federate(
        digits_bundle, broker=broker, data=shards, test=test,
        rounds={"total": 6}, training={"epochs": 1, "batch_size": 32, "learning_rate": 0.1, "momentum": 0.5},
    )  # fmt: skip
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(6)
    records, summary = federation.records(), federation.summary()
    accuracies = [record["accuracy"] for record in records]
    # Chance is 0.1.
    assert accuracies[-1] > 0.7, accuracies
    assert accuracies[-1] > accuracies[0]
    assert summary["final_accuracy"] == accuracies[-1]
    assert set(summary["accuracy_by_client"]) == set(federation.names)
    assert summary["bytes_up_float32"] > 20 * summary["update_bytes_mean"] * summary["rounds"] * 3
    if broker.startswith("mosquitto"):
        version = "5" if broker == "mosquitto" else "3.1.1"
        assert f"by MQTT {version}\n" in clients["client-1"].output
    else:
        assert "by MQTT 3.1.1\n" in clients["client-1"].output


def test_clients_on_different_runtimes_share_every_round(federate, tmp_path):
    pytest.importorskip("sklearn")
    runtimes = ("onnxruntime", "torch", "executorch")
    bundle = tmp_path / "digits-cnn.edge"
    asked = [argument for runtime in runtimes for argument in ("--runtime", runtime)]
    command = [sys.executable, "-m", "edgetrain", "-q", "export", "digits-cnn", "--micro-batch", "32", *asked]
    subprocess.run([*command, "-o", bundle], check=True, capture_output=True)
    shards, test = digits_shards(3)
    chosen = {f"client-{number}": {"runtime": runtime} for number, runtime in enumerate(runtimes, 1)}
    federation = federate(
        bundle, data=shards, test=test, of_clients=chosen,
        rounds={"total": 4}, training={"epochs": 1, "batch_size": 32, "learning_rate": 0.1, "momentum": 0.5},
    )  # fmt: skip
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    assert coordinator.wait() == 0, coordinator.output
    for name, client in clients.items():
        assert client.wait() == 0, client.output
        assert f"runs on {chosen[name]['runtime']}; self-test passed" in client.output
    records = federation.records()
    assert [record["accepted"] for record in records] == [3] * 4
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    federation.check_nothing_lost_or_doubled(4)


def test_a_client_that_is_killed_comes_back(federate):
    federation = federate()
    coordinator = federation.start_coordinator()
    clients = federation.start_clients()
    for number, victim in ((4, "client-1"), (9, "client-2")):
        federation.wait_for_rounds(number, coordinator)
        clients[victim].kill()
        clients[victim] = federation.start_client(victim)
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(20, clients_killed=2)
    rounds_of_victim = [number for name, number in federation.accepted_by_coordinator() if name == "client-1"]
    assert rounds_of_victim[-1] > 12, "it took part again"


def test_a_coordinator_that_is_killed_goes_on(federate):
    federation = federate()
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    for number in (3, 8):
        federation.wait_for_rounds(number, coordinator)
        coordinator.kill()
        coordinator = federation.start_coordinator()
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(20)
    # Nobody was left out for more than the round that a kill fell into.
    assert sum(record["accepted"] == 3 for record in federation.records()) >= 15
    losses = [record["loss"] for record in federation.records()]
    assert losses[-1] < losses[0]


def test_everyone_is_killed_at_once(federate):
    federation = federate()
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    for number in (4, 9):
        federation.wait_for_rounds(number, coordinator)
        for process in (*clients.values(), coordinator):
            process.kill()
        coordinator, clients = federation.start_coordinator(), federation.start_clients()
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(20, clients_killed=6)


@pytest.mark.parametrize("broker", ["mosquitto", "embedded"])
def test_a_broker_that_is_restarted_is_found_again(federate, broker):
    # Nobody can be left behind: a run that ends before a client is back cannot tell it what became of its update.
    federation = federate(broker=broker, rounds={"minimum": 3})
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    federation.wait_for_rounds(5, coordinator)
    federation.stop_broker()
    federation.start_broker()
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(20)


# --- interrupts --------------------------------------------------------------------------------------


def check_interrupted(process, *, seconds=15.0):
    assert process.wait(seconds) == 130, process.output
    assert "Traceback" not in process.output, process.output
    assert [line for line in process.output.splitlines() if line][-1] == "interrupted"
    assert process.output.count("interrupted\n") == 1


def test_an_interrupted_coordinator_goes_on_where_it_was(federate):
    federation = federate()
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    federation.wait_for_rounds(5, coordinator)
    coordinator.interrupt()
    check_interrupted(coordinator)
    assert federation.summary()["status"] == "interrupted"
    assert all(client.running() for client in clients.values()), "they wait"
    coordinator = federation.start_coordinator()
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(20)
    assert federation.summary()["status"] == "completed"


def test_interrupts_while_waiting(federate):
    """A coordinator without clients, a client without a coordinator, either without a broker."""
    federation = federate(clients=1, rounds={"minimum": 1})
    coordinator = federation.start_coordinator()
    wait_for(lambda: "waiting for clients" in coordinator.output, "the coordinator")
    coordinator.interrupt()
    check_interrupted(coordinator)
    client = federation.start_client("client-1")
    wait_for(lambda: "waits for federation" in client.output, "the client")
    client.interrupt()
    check_interrupted(client)
    federation.stop_broker()
    (federation.run / "run.json").unlink()
    coordinator.log.unlink()
    client.log.unlink()
    for process in (federation.start_coordinator(), federation.start_client("client-1")):
        wait_for(lambda process=process: "trying again" in process.output, "a broker")
        process.interrupt()
        check_interrupted(process)


def test_an_interrupted_client_leaves_and_comes_back(federate):
    # The rounds wait for it: they are so short that all would be over before it is back.
    federation = federate(rounds={"minimum": 3})
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    federation.wait_for_rounds(5, coordinator)
    clients["client-3"].interrupt()
    check_interrupted(clients["client-3"])
    wait_for(lambda: "client-3 left: interrupted" in coordinator.output, "the coordinator to hear of it")
    clients["client-3"] = federation.start_client("client-3")
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    federation.check_nothing_lost_or_doubled(20)


def test_an_interrupt_at_any_moment_of_the_start_is_one_line(federate):
    """Before our own code runs Python may say what it likes; from the first import on it is one line."""
    federation = federate(clients=1)
    for delay in (0.35, 0.6, 0.9, 1.3):
        client = federation.start_client("client-1")
        time.sleep(delay)  # the moment is the point
        client.interrupt()
        assert client.wait(15) in {130, -2}, client.output
        assert "edgetrain/edge_client" not in client.output or "Traceback" not in client.output, client.output


# --- versions ----------------------------------------------------------------------------------------

OTHER_VERSION = """
import sys
import edgetrain.protocol.signing as signing
signing.PROTOCOL_VERSION = 2
from edgetrain.cli import main
main()
"""


def test_a_client_of_another_protocol_version_is_told_so_and_the_run_goes_on(federate, processes, tmp_path):
    federation = federate(rounds={"total": 5, "goal": 2})
    coordinator = federation.start_coordinator()
    first = federation.start_client("client-1")
    wait_for(lambda: "client-1 joined" in coordinator.output, "client-1")
    command = [sys.executable, "-c", OTHER_VERSION, "client", "--config", tmp_path / "client-3.toml"]
    stranger = processes.start(command, tmp_path / "client-3.log", env=ENVIRONMENT)
    assert stranger.wait() == 1
    assert stranger.output.count("error: ") == 1
    assert "the coordinator speaks protocol version 1" in stranger.output
    assert "install the same version of edgetrain on both" in stranger.output
    second = federation.start_client("client-2")
    assert coordinator.wait() == 0, coordinator.output
    assert [first.wait(), second.wait()] == [0, 0]
    assert federation.summary()["clients"] == 2


def test_a_client_whose_data_does_not_fit_says_so(federate, tmp_path):
    import numpy as np

    federation = federate(rounds={"total": 3, "goal": 2})
    np.savez(tmp_path / "client-3.npz", inputs=np.zeros((5, 9), np.float32), targets=np.zeros(5, np.int64))
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    assert clients["client-3"].wait() == 1
    assert clients["client-3"].output.splitlines()[-1].startswith("error: ")
    assert "inputs" in clients["client-3"].output.splitlines()[-1]
    assert coordinator.wait() == 0, coordinator.output


def test_two_clients_of_one_name_from_two_directories(federate, processes, tmp_path):
    """The second has another key: it is sent away, the first is not disturbed."""
    federation = federate(clients=2, rounds={"total": 60})
    clients = federation.start_clients()
    coordinator = federation.start_coordinator()
    federation.wait_for_rounds(3, coordinator)
    twin = processes.edgetrain(
        "client", "--config", tmp_path / "client-1.toml", "--state", tmp_path / "twin",
        log=tmp_path / "twin.log", env=ENVIRONMENT,
    )  # fmt: skip
    assert twin.wait() == 1
    assert "belongs to another key" in twin.output.splitlines()[-1]
    assert coordinator.wait() == 0, coordinator.output
    assert [client.wait() for client in clients.values()] == [0, 0]
    federation.check_nothing_lost_or_doubled(60)


def test_two_coordinators_in_one_directory(federate):
    federation = federate(clients=1)
    first = federation.start_coordinator()
    wait_for(lambda: "waiting for clients" in first.output, "the coordinator")
    second = federation.processes.edgetrain(
        "coordinator", "--config", federation.path / "federation.toml", log=federation.path / "second.log"
    )
    assert second.wait() == 1
    assert "another coordinator runs in this directory" in second.output
    assert free_port()

"""Secure aggregation among real processes through mosquitto, one of them killed in the middle."""

from __future__ import annotations

import signal

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.coordinator.run.journal_reading import read_journal
from edgetrain.coordinator.secure.records import SecureReceived
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.training.seeds import mix_seed
from edgetrain.edge_client.training.trainer import train
from edgetrain.edge_client.workplace import split_validation
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs.hashing import uniform
from edgetrain.protocol.codecs.selection import random_k
from edgetrain.protocol.training import TrainingConfig
from support.federation import Federation
from support.processes import wait_for
from support.tiny_bundle import make_data

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

TRAINING = {"epochs": 1, "batch_size": 8, "learning_rate": 0.1}


def phase_of(federation, name):
    """Where a client's session is, by its file."""
    path = federation.path / name / "secure.bin"
    return msgspec.msgpack.decode(path.read_bytes())["member"]["phase"] if path.exists() else None


def advertised(federation):
    """Whose keys the coordinator has in its journal."""
    path = federation.run / "journal" / "round-00001.journal"
    records = [meta for meta, _ in read_journal(path)] if path.exists() else []
    return {record.client for record in records if isinstance(record, SecureReceived)}


def plain_sum(federation, tiny_bundle, survivors, largest_weight):
    """Parameters after round 1: what these clients learn here, quantized and added up in the clear."""
    bundle = Bundle(tiny_bundle)
    session, start = open_session(bundle), bundle.initial_parameters()
    positions = random_k(66, 33, 1)
    integers, weights = np.zeros(33, np.int64), 0
    for name in survivors:
        data, _ = split_validation(load_dataset(str(federation.path / f"{name}.npz"), bundle.manifest), 0.1, name)
        result = train(session, start, data, TrainingConfig(**TRAINING), seed=mix_seed(0, name, 1))
        target = (result.parameters - start)[positions].astype(np.float64)
        scaled = target * (len(data) / largest_weight) / (0.05 / 127)
        noise = uniform(mix_seed(0, name + "/codec", 1), 2, 33).astype(np.float64)
        integers += np.clip(np.floor(scaled + noise), -127, 127).astype(np.int64)
        weights += len(data)
    mean = (integers * (0.05 / 127) / (weights / largest_weight)).astype(np.float32).astype(np.float64)
    end = start.astype(np.float64)
    end[positions] += np.rint(mean * weights * 2.0**30) / (weights * 2.0**30)
    return {
        entry.name: end[entry.offset : entry.offset + int(np.prod(entry.shape))].astype(np.float32).reshape(entry.shape)
        for entry in bundle.manifest.parameters
    }


@pytest.fixture
def federation(processes, tiny_bundle, tmp_path):
    """Four clients; the fourth has so much to learn that the others have advertised keys long before."""
    data = [make_data(40 + 10 * number, seed=number) for number in range(3)] + [make_data(30_000, seed=9)]
    federation = Federation(
        processes,
        tmp_path,
        tiny_bundle,
        clients=4,
        data=data,
        codec="randk:0.5|int8:block=all:stochastic|packed",
        rounds={"total": 2, "minimum": 3, "deadline_seconds": 60.0},
        training=TRAINING,
        secure_aggregation={"enabled": True, "phase_seconds": 40.0},
    )
    yield federation
    processes.end_all()
    federation.stop_broker()


def stop_in_the_middle(federation):
    """(coordinator, clients): client 3 stands still, so that nobody gets beyond sharing; the others have shared."""
    coordinator = federation.start_coordinator()
    clients = federation.start_clients()
    wait_for(lambda: len(advertised(federation)) == 3, "three clients have advertised keys")
    assert advertised(federation) == {"client-1", "client-2", "client-3"}
    clients["client-3"].popen.send_signal(signal.SIGSTOP)
    wait_for(lambda: phase_of(federation, "client-4") == "shared", "client 4 has shared")
    journal = federation.run / "journal" / "round-00001.journal"

    def messages(name):
        return sum(isinstance(meta, SecureReceived) and meta.client == name for meta, _ in read_journal(journal))

    wait_for(lambda: [messages(name) for name in federation.names] == [2, 2, 1, 2], "the coordinator has all shares")
    return coordinator, clients


def check_first_round(federation, tiny_bundle, survivors):
    assert [name for name, number in federation.accepted_by_coordinator() if number == 1] == survivors
    assert [record["attempts"] for record in federation.records()] == [1, 1]
    saved = load_file(federation.run / "parameters" / "round-00001.safetensors")
    expected = plain_sum(federation, tiny_bundle, survivors, largest_weight=27_000)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(saved[name], tensor)
    start = Bundle(tiny_bundle).initial_parameters()
    assert not np.array_equal(np.concatenate([tensor.ravel() for tensor in expected.values()]), start)


def test_four_clients_one_killed_after_it_has_shared(federation, tiny_bundle):
    """The sum is exactly that of the three that are left, whose masks with the fourth are taken off."""
    coordinator, clients = stop_in_the_middle(federation)
    clients["client-4"].kill()
    clients["client-3"].popen.send_signal(signal.SIGCONT)
    assert coordinator.wait() == 0, coordinator.output
    survivors = ["client-1", "client-2", "client-3"]
    for name in survivors:
        assert clients[name].wait() == 0, clients[name].output
    check_first_round(federation, tiny_bundle, survivors)
    federation.check_nothing_lost_or_doubled(2, clients_killed=1)


def test_a_coordinator_killed_in_the_middle_goes_on(federation, tiny_bundle):
    """The session is taken up where it was: nobody starts anew, and everybody is in the sum."""
    coordinator, clients = stop_in_the_middle(federation)
    coordinator.kill()
    coordinator = federation.start_coordinator()
    clients["client-3"].popen.send_signal(signal.SIGCONT)
    assert coordinator.wait() == 0, coordinator.output
    for client in clients.values():
        assert client.wait() == 0, client.output
    check_first_round(federation, tiny_bundle, federation.names)
    federation.check_nothing_lost_or_doubled(2)

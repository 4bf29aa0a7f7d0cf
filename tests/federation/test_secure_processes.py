"""Secure aggregation among real processes through mosquitto, one of them killed in the middle."""

from __future__ import annotations

import signal

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.coordinator.journal_reading import read_journal
from edgetrain.coordinator.secure_records import SecureReceived
from edgetrain.edge_client.client import _mix_seed, split_validation
from edgetrain.edge_client.data import load_dataset
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.trainer import train
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
        result = train(session, start, data, TrainingConfig(**TRAINING), seed=_mix_seed(0, name, 1))
        target = (result.parameters - start)[positions].astype(np.float64)
        scaled = target * (len(data) / largest_weight) / (0.05 / 127)
        noise = uniform(_mix_seed(0, name + "/codec", 1), 2, 33).astype(np.float64)
        integers += np.clip(np.floor(scaled + noise), -127, 127).astype(np.int64)
        weights += len(data)
    mean = (integers * (0.05 / 127) / (weights / largest_weight)).astype(np.float32).astype(np.float64)
    end = start.astype(np.float64)
    end[positions] += np.rint(mean * weights * 2.0**30) / (weights * 2.0**30)
    return {
        entry.name: end[entry.offset : entry.offset + int(np.prod(entry.shape))].astype(np.float32).reshape(entry.shape)
        for entry in bundle.manifest.parameters
    }


def test_four_clients_one_killed_after_it_has_shared(processes, tiny_bundle, tmp_path):
    # Client 4 has so much to learn that the others are done long before.
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
    try:
        coordinator = federation.start_coordinator()
        clients = federation.start_clients()
        wait_for(lambda: len(advertised(federation)) == 3, "three clients have advertised keys")
        assert advertised(federation) == {"client-1", "client-2", "client-3"}
        # While client 3 stands still, nobody gets beyond sharing.
        clients["client-3"].popen.send_signal(signal.SIGSTOP)
        wait_for(lambda: phase_of(federation, "client-4") == "shared", "client 4 has shared")
        wait_for(lambda: len(advertised(federation)) == 4, "the coordinator has its keys")
        journal = federation.run / "journal" / "round-00001.journal"
        wait_for(
            lambda: sum(isinstance(meta, SecureReceived) and meta.client == "client-4"
                        for meta, _ in read_journal(journal)) == 2, "the coordinator has its shares"
        )  # fmt: skip
        clients["client-4"].kill()
        clients["client-3"].popen.send_signal(signal.SIGCONT)
        assert coordinator.wait() == 0, coordinator.output
        for name in ("client-1", "client-2", "client-3"):
            assert clients[name].wait() == 0, clients[name].output
    finally:
        processes.end_all()
        federation.stop_broker()
    survivors = ["client-1", "client-2", "client-3"]
    assert [name for name, number in federation.accepted_by_coordinator() if number == 1] == survivors
    assert [record["attempts"] for record in federation.records()] == [1, 1]
    federation.check_nothing_lost_or_doubled(2, clients_killed=1)
    saved = load_file(federation.run / "parameters" / "round-00001.safetensors")
    expected = plain_sum(federation, tiny_bundle, survivors, largest_weight=27_000)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(saved[name], tensor)
    assert any((tensor != Bundle(tiny_bundle).initial_parameters()[:1]).any() for tensor in saved.values())

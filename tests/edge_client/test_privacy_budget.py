"""The device's own budget, in a federation of real clients: it holds whatever the coordinator asks for."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from edgetrain.coordinator.config import EvaluationConfig, RoundsConfig
from edgetrain.coordinator.errors import RoundFailed
from edgetrain.edge_client.privacy.sample_budget import DeviceBudget, DevicePrivacy
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.private_steps import check_bundle
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.privacy import PrivacyError, Release, spent
from edgetrain.protocol.training import SamplePrivacy, TrainingConfig
from support.in_memory import Federation

DELTA = 1e-5
TRAINING = TrainingConfig(batch_size=10, learning_rate=0.2, privacy=SamplePrivacy(noise_multiplier=2.0))


def release(rounds):
    """40 samples in batches of 10: four steps a round with rate 1/4."""
    return Release(mechanism="gaussian", noise_multiplier=2.0, sampling="poisson", sampling_rate=0.25, steps=4 * rounds)


def make_shards(count=2):
    rng = np.random.default_rng(0)
    shards = [rng.normal(size=(40, 5)).astype(np.float32) for _ in range(count)]
    return [(x, np.argmax(x[:, :3], axis=1)) for x in shards]


def serve(federation, total, **settings):
    fields = {
        "rounds": RoundsConfig(total=total, goal=2, gather_seconds=10.0, deadline_seconds=20.0, max_failures=1),
        "training": TRAINING,
        "codec": "dense|float32",
    } | settings
    federation.start()
    try:
        return federation.coordinator(**fields).run()
    finally:
        federation.finish()


def ledger_of(directory, name):
    return json.loads((directory / name / "privacy.json").read_bytes())


def test_devices_stop_at_their_budget_and_keep_count_over_restarts(private_bundle, tmp_path):
    budget = DevicePrivacy(epsilon=spent([release(3)], DELTA).epsilon * 1.001, delta=DELTA)
    federation = Federation(tmp_path, private_bundle, make_shards(), privacy=budget)
    assert serve(federation, 2).rounds == 2
    assert [entry["steps"] for entry in ledger_of(tmp_path, "client-0")["releases"]] == [8]
    federation.reopen()
    with pytest.raises(RoundFailed, match=r"round 4.*the privacy budget does not allow it"):
        serve(federation, 10)
    for name in ("client-0", "client-1"):
        assert [entry["steps"] for entry in ledger_of(tmp_path, name)["releases"]] == [12]


def test_nothing_that_is_computed_from_samples_goes_along(private_bundle, tmp_path):
    federation = Federation(
        tmp_path, private_bundle, make_shards(), privacy=DevicePrivacy(epsilon=50.0, delta=DELTA),
        validation_fraction=0.2,
    )  # fmt: skip
    summary = serve(federation, 1, evaluation=EvaluationConfig(by_clients=True))
    rows = list(csv.DictReader((tmp_path / "run/clients.csv").read_text().splitlines()))
    assert [(row["status"], row["loss"], row["accuracy"], row["steps"]) for row in rows] == [
        ("accepted", "", "", "4")
    ] * 2
    assert summary.accuracy_by_client == {}


def test_a_plan_without_noise_is_declined(private_bundle, tmp_path):
    federation = Federation(tmp_path, private_bundle, make_shards(), privacy=DevicePrivacy(epsilon=5.0, delta=DELTA))
    with pytest.raises(RoundFailed, match="the plan has no noise for its samples"):
        serve(federation, 1, training=TrainingConfig(batch_size=10))
    assert ledger_of(tmp_path, "client-0")["releases"] == []


def test_a_bundle_without_clipping_is_refused_at_both_ends(tiny_bundle, private_bundle, tmp_path):
    federation = Federation(tmp_path, tiny_bundle, make_shards())
    with pytest.raises(ConfigError, match="export it with --per-sample-clipping"):
        federation.coordinator(training=TRAINING)
    federation.close()
    with pytest.raises(PrivacyError, match="export it with --per-sample-clipping"):
        check_bundle(open_session(Bundle(tiny_bundle), "onnxruntime", threads=1), TRAINING)
    check_bundle(open_session(Bundle(private_bundle), "onnxruntime", threads=1), TRAINING)


def test_without_a_limit_a_device_keeps_count_of_what_it_was_asked_for(private_bundle, tmp_path):
    federation = Federation(tmp_path, private_bundle, make_shards())
    assert serve(federation, 2).rounds == 2
    assert ledger_of(tmp_path, "client-1")["epsilon"] is None
    assert [entry["steps"] for entry in ledger_of(tmp_path, "client-1")["releases"]] == [8]


def test_it_pays_before_the_result_leaves_and_not_before(tmp_path):
    config = DevicePrivacy(epsilon=3.0, delta=DELTA)
    budget = DeviceBudget(tmp_path / "privacy.json", "c", config)
    budget.check(TRAINING, 40)
    assert budget.epsilon == 0
    budget.charge(TRAINING, 40)
    assert budget.epsilon == pytest.approx(spent([release(1)], DELTA).epsilon)
    budget.close()
    with pytest.raises(PrivacyError, match="not loosened"):
        DeviceBudget(tmp_path / "privacy.json", "c", DevicePrivacy())

"""Weights in int8 learn what float weights learn, because their gradient is divided by the square of the scale.

digits-cnn, from its random start: 38,016 of its 38,282 parameters are in int8. The same training without that division
is made by multiplying the gradients by the square of the scale before the trainer sees them.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from edgetrain.edge_client import open_session
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.export import Storage, export_bundle
from edgetrain.models import get_model
from edgetrain.models.data import digits
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
from edgetrain.simulation import SimulationConfig, simulate

MICRO_BATCH = 32
TRAINING = TrainingConfig(epochs=5, batch_size=32, learning_rate=0.1)


class Unscaled:
    """A session whose gradients are short of the division: a plain step on the integers."""

    def __init__(self, session):
        self._session = session
        self.manifest = session.manifest

    def step(self, parameters, batch, weights):
        result = self._session.step(parameters, batch, weights)
        assert isinstance(parameters, Int8Parameters)
        entries = [entry for entry in self.manifest.parameters if entry.dtype == "int8"]
        scales = parameters.graph_inputs()[len(self.manifest.parameters) :]
        for entry, scale in zip(entries, scales, strict=True):
            gradient = entry.of(result.gradients)
            gradient *= scale.reshape(-1, *[1] * (gradient.ndim - 1)) ** 2
        return result


@pytest.fixture(scope="module")
def data():
    train_set, test_set = digits()
    return tuple(Dataset(part.inputs, part.targets) for part in (train_set, test_set))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    source = get_model("digits-cnn", batch_size=MICRO_BATCH)
    return tuple(
        Bundle(export_bundle(*source, out=folder / kind, storage=Storage(trainable=kind, max_loss_change=0.1)))
        for kind in ("float32", "int8")
    )


def accuracy(session, parameters, test):
    return float(evaluate(session, parameters, test).metrics["correct"])


def test_int8_learns_as_float_does_and_without_the_scaling_it_does_not(bundles, data):
    reached = {}
    for bundle, name in zip((bundles[0], bundles[1], bundles[1]), ("float32", "int8", "unscaled"), strict=True):
        session = open_session(bundle)
        learner = Unscaled(session) if name == "unscaled" else session
        result = train(learner, bundle.initial_parameters(), data[0], TRAINING, seed=1)
        reached[name] = accuracy(session, result.parameters, data[1])
    assert reached["float32"] > 0.96
    assert reached["int8"] > reached["float32"] - 0.015
    assert reached["unscaled"] < reached["int8"] - 0.05


def test_a_federation_learns_with_it_over_the_ordinary_codecs(bundles, data):
    """The updates are float32 as ever: top-k and int8 on the wire, averaged by the coordinator."""
    rows = np.array_split(np.random.default_rng(0).permutation(len(data[0])), 4)
    shards = [data[0].subset(part) for part in rows]
    config = SimulationConfig(
        rounds=4,
        clients_per_round=4,
        training=TrainingConfig(epochs=2, batch_size=32, learning_rate=0.1),
        codec="topk:0.1|int8:block=256|rice",
        evaluate_every=4,
    )
    *_, last = simulate(open_session(bundles[1]), bundles[1].initial_parameters(), shards, data[1], config)
    assert not last.refused
    assert not last.declined
    assert last.accuracy > 0.9

"""A federation whose clients train on kept features learns what one learns that runs the frozen part every time."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from edgetrain.coordinator.config import EvaluationConfig, RoundsConfig
from edgetrain.edge_client import open_session
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.export import export_bundle
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
from edgetrain.simulation.simulate import SimulationConfig, simulate
from support.frozen import cnn_data, frozen_cnn
from support.in_memory import Federation

TRAINING = TrainingConfig(epochs=4, batch_size=32, learning_rate=0.2)


def test_clients_keep_features_and_learn_the_same(tmp_path):
    path = export_bundle(*frozen_cnn(), trainable="last:2", out=tmp_path / "bundle")
    shards = [tuple(leaf.numpy() for leaf in cnn_data(count, seed=count)) for count in (21, 13)]
    federation = Federation(tmp_path, path, shards)
    coordinator = federation.coordinator(
        rounds=RoundsConfig(total=2, goal=2, deadline_seconds=60),
        training=TRAINING,
        codec="dense|float32",
        downlink_codec="dense|float32",
        evaluation=EvaluationConfig(by_clients=False),
    )
    federation.start()
    coordinator.run()
    federation.finish()
    # A header of 128, scales of 4 bytes, 12 features of 2 bytes, at multiples of 64.
    assert (tmp_path / "client-0" / "features-training.bin").stat().st_size == 128 + 128 + 512
    assert (tmp_path / "client-1" / "features-training.bin").stat().st_size == 128 + 64 + 320
    bundle = Bundle(path)
    start = bundle.initial_parameters()
    *_, last = simulate(
        open_session(bundle),
        start,
        [Dataset(*shard) for shard in shards],
        Dataset(*shards[0]),
        SimulationConfig(rounds=2, clients_per_round=2, training=TRAINING, strategy="fedavg"),
    )
    moved = np.linalg.norm(last.parameters - start)
    assert moved > 0.1
    # Features have 11 significant bits.
    assert np.linalg.norm(coordinator._parameters - last.parameters) < 2e-3 * moved

"""Onnxruntime-training's own SGD loop, where that runtime is installed."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes.ort_training_native import NativeTrainer
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.training.trainer import batches, train
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
from support.tiny_bundle import initial_parameters, write_tiny_bundle

here = pytest.mark.skipif("ort-training" not in available_runtimes(), reason="needs onnxruntime-training")


@here
def test_its_own_sgd_takes_the_same_steps_as_the_local_trainer(case):
    bundle = Bundle(case.bundle)
    session = open_session(bundle, "ort-training")
    dataset = load_dataset(case.data, bundle.manifest)
    config = TrainingConfig(epochs=2, batch_size=10, learning_rate=0.2)
    start = bundle.initial_parameters()
    expected = train(session, start, dataset, config, seed=5)
    native = NativeTrainer(bundle, start)
    loss_sum = weight_sum = 0.0
    for indices in batches(len(dataset), config, 5):
        for first in range(0, len(indices), bundle.manifest.micro_batch):
            part = indices[first : first + bundle.manifest.micro_batch]
            result = native.accumulate(*dataset.take(part))
            loss_sum, weight_sum = loss_sum + result.loss_sum, weight_sum + result.weight_sum
        native.apply(0.2)
    np.testing.assert_allclose(native.parameters(), expected.parameters, rtol=1e-4, atol=1e-6)
    assert loss_sum / weight_sum == pytest.approx(expected.loss, rel=1e-5)
    assert np.abs(native.parameters() - start).max() > 1e-3
    np.testing.assert_array_equal(start, bundle.initial_parameters())


@here
def test_applying_nothing_is_refused(case):
    bundle = Bundle(case.bundle)
    with pytest.raises(DataError, match="nothing was accumulated"):
        NativeTrainer(bundle, bundle.initial_parameters()).apply(0.1)


@pytest.mark.skipif("ort-training" in available_runtimes(), reason="it is installed")
def test_without_the_training_build_it_says_what_to_install(tmp_path):
    bundle = Bundle(write_tiny_bundle(tmp_path / "tiny"))
    with pytest.raises(SessionError, match=r"onnxruntime-training-cpu==1\.19\.2"):
        NativeTrainer(bundle, initial_parameters())

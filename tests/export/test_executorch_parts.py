"""Executorch bundles in parts: trunk and head, the trunk in integers, and the program for TrainingModule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("executorch.exir")

from edgetrain.edge_client import open_session
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.frozen_part import skip_frozen_part
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.edge_client.training.trainer import train
from edgetrain.export import Storage, ToleranceError, export_bundle
from edgetrain.export.errors import UnsupportedError
from edgetrain.export.lowering.executorch import partition
from edgetrain.export.lowering.executorch.diagnosis import check_integers
from edgetrain.models.losses import cross_entropy
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
from support.bundles import eager_step, flat_parameters
from support.executorch_bundles import int8_bundle, split_bundle
from support.frozen import cnn_data, frozen_cnn


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


CONFIG = ClientConfig(name="c", federation="f", data="none", feature_cache="float32")


@pytest.fixture(scope="module")
def bundle():
    return Bundle(split_bundle())


def test_trunk_and_head_are_the_step(bundle):
    session = open_session(bundle, "executorch")
    (inputs, targets), weights = read_self_test(bundle)
    parameters = bundle.initial_parameters() + np.float32(0.01)
    whole = session.step(parameters, (inputs, targets), weights)
    expected = whole.gradients.copy()
    features = session.features(inputs)
    with torch.no_grad():
        exact = frozen_cnn()[0].eval()[:9](torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(features["features.0"], exact, rtol=1e-4, atol=1e-6)
    head = session.head()
    part = head.step(parameters, (features, targets), weights)
    assert part.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    np.testing.assert_allclose(part.gradients, expected, atol=1e-5 * np.abs(expected).max())
    assert head.evaluate(parameters, (features, targets), weights).loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert run_self_test(bundle, session, in_parts=True).worst < 1e-4


def test_the_trunk_takes_a_ragged_batch(bundle):
    session = open_session(bundle, "executorch")
    inputs = cnn_data(4, seed=1)[0].numpy()
    whole, some = session.features(inputs)["features.0"], session.features(inputs[:3])["features.0"]
    assert len(some) == 3
    np.testing.assert_allclose(some, whole[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [split_bundle, int8_bundle], ids=["float32", "int8"])
def test_a_client_trains_on_kept_features_as_on_the_whole_step(make, tmp_path):
    opened = Bundle(make())
    session = open_session(opened, "executorch")
    inputs, targets = (half.numpy() for half in cnn_data(18, seed=3))
    dataset = Dataset(inputs, targets, np.linspace(0.5, 1, 18))
    training = TrainingConfig(epochs=2, batch_size=7, learning_rate=0.1, momentum=0.9)
    start = opened.initial_parameters()
    plain = train(session, start, dataset, training, seed=3).parameters
    head, features, _ = skip_frozen_part(
        session, dataset, None, bundle=opened.digest, directory=tmp_path, config=CONFIG
    )
    assert [leaf.name for leaf in head.manifest.batch.inputs.leaves] == ["features.0"]
    kept = train(head, start, features, training, seed=3).parameters
    assert np.linalg.norm(kept - plain) <= 1e-5 * np.linalg.norm(plain - start)


def test_the_trunk_in_integers_is_smaller_and_its_error_is_stated():
    opened = Bundle(int8_bundle())
    program = opened.manifest.program("executorch")
    assert set(program.graphs) == {"trunk", "head_step", "head_eval", "infer"}
    report = program.storage
    assert report.calibration_samples == 20
    assert report.trunk_bytes_after < report.trunk_bytes_before
    assert abs(report.loss_after / report.loss_before - 1) < 0.05
    session = open_session(opened, "executorch")
    inputs = cnn_data(20, seed=9)[0]
    with torch.no_grad():
        exact = frozen_cnn()[0].eval()[:9](inputs).numpy()
    batches = [session.features(inputs[i : i + 4].numpy())["features.0"] for i in range(0, 20, 4)]
    got = np.concatenate(batches)
    error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    assert 1e-4 < error < 0.1
    assert report.feature_error == pytest.approx(error, rel=1e-3)
    assert opened.manifest.frozen.quantized == {"0.weight": "int8", "3.weight": "int8", "5.weight": "int8"}
    assert run_self_test(opened, session).worst < 1e-4


@pytest.mark.slow
def test_integers_beyond_the_tolerance_are_refused_and_nothing_is_written(tmp_path):
    storage = Storage(kind="int8-static", calibration=cnn_data(8, seed=9), max_loss_change=1e-9)
    with pytest.raises(ToleranceError, match=r"change the loss .* allowed are 0\.0%"):
        export_bundle(*frozen_cnn(), trainable="last:2", runtimes=("executorch",), out=tmp_path / "b", storage=storage)
    assert list(tmp_path.iterdir()) == []


def test_an_integer_kernel_that_computes_something_else_is_refused():
    exact = [torch.linspace(-1, 1, 64)]
    rounded = [(exact[0] * 127).round() / 127]
    check_integers(exact, rounded, [rounded[0] * 1.005])
    with pytest.raises(UnsupportedError, match=r"off by 10\.\d% on executorch, by 0\.\d% in torch's reference"):
        check_integers(exact, rounded, [exact[0] * 1.1])


def test_a_program_that_holds_its_parameters_may_multiply_windows_apart(monkeypatch, tmp_path):
    """Its weights are read in partitions of their own then, and ExecuTorch has no views of what a program holds."""
    monkeypatch.setattr(partition, "TOGETHER", 0)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1, stride=2)]
    module = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1), Mean())
    batch = (torch.randn(4, 2, 12, 12), torch.randint(5, (4,)))
    path = export_bundle(
        module,
        cross_entropy,
        batch,
        runtimes=("executorch",),
        executorch_style="training-module",
        out=tmp_path / "bundle",
        name="held",
    )
    assert "training_module" in Bundle(path).manifest.program("executorch").graphs


@pytest.mark.filterwarnings("ignore:This API is experimental")
def test_trainingmodule_gives_eager_gradients_and_trains_with_executorchs_optimizer(bundle, tmp_path):
    """As an app would: the program, the file beside it, ExecuTorch's own module and optimizer."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch
    from executorch.extension.training import TrainingModule, get_sgd_optimizer

    graph = bundle.manifest.program("executorch").graphs["training_module"]
    assert [spec.name for spec in graph.inputs] == ["inputs", "targets", "weights"]
    paths = [tmp_path / entry.file.rpartition("/")[2] for entry in (graph.file, *graph.extra_files)]
    for path, entry in zip(paths, (graph.file, *graph.extra_files), strict=True):
        path.write_bytes(bundle.read(entry))
    assert [path.suffix for path in paths] == [".pte", ".ptd"]
    assert graph.extra_files[0].size < 3 * 4 * bundle.manifest.num_parameters + 4096
    trainer = TrainingModule(_load_for_executorch(str(paths[0]), str(paths[1])))
    module, loss, _ = frozen_cnn()
    module.eval()
    optimizer = None
    for seed in range(4):
        inputs, targets = cnn_data(4, seed=seed)
        weights = torch.linspace(0.5, 1, 4)
        total, gradients = eager_step(module, loss, (inputs, targets), weights.numpy())
        outputs = trainer.forward_backward("forward", [inputs, targets, weights])
        assert float(outputs[0]) == pytest.approx(total, rel=1e-5)
        assert float(outputs[1]) == pytest.approx(3.0)
        found = trainer.named_gradients()
        assert set(found) == {entry.name for entry in bundle.manifest.parameters}
        for name, gradient in found.items():
            np.testing.assert_allclose(gradient, gradients[name], atol=1e-4 * np.abs(gradients[name]).max())
        optimizer = optimizer or get_sgd_optimizer(trainer.named_parameters(), 0.1)
        optimizer.step(found)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in found:
                    parameter.sub_(0.1 * torch.from_numpy(gradients[name]))
    flat = np.concatenate([trainer.named_parameters()[e.name].numpy().ravel() for e in bundle.manifest.parameters])
    np.testing.assert_allclose(flat, flat_parameters(module, bundle.manifest), rtol=1e-4, atol=1e-6)

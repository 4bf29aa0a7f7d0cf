"""Where the step is cut in two, and that both parts together are the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgetrain.edge_client import open_session
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.export import export_bundle
from edgetrain.export.batch import read_example
from edgetrain.export.exporter import make_problem
from edgetrain.export.graph.decompositions import common
from edgetrain.export.graph.joint import trace_step
from edgetrain.export.graph.partition import split_step
from edgetrain.export.prepare import prepare
from edgetrain.protocol.bundle import Bundle
from support.frozen import MICRO_BATCH, frozen_cnn, frozen_text


def split(source, trainable):
    module, loss, batch = source
    example = read_example(batch, None)
    problem = make_problem(prepare(module, trainable), loss, example)
    step = trace_step(problem, common())
    leaves = example.inputs.leaf_names
    return split_step(step, num_parameters=len(problem.names), inputs=leaves, micro_batch=example.micro_batch)


def crossing(parts):
    return [tuple(spec.shape[1:]) for spec in parts.trunk.outputs]


def test_the_pooled_vector_crosses_not_the_image_before_it():
    parts = split(frozen_cnn(), "last:2")
    assert crossing(parts) == [(12,)]
    assert parts.bytes_per_sample == 12 * 4
    # The convolutions: 2*9*16 + 16*9*32/4 + 32*12/4 multiplications per pixel; what learns has 120.
    assert parts.share > 0.9
    assert [spec.name for spec in parts.trunk.inputs] == ["inputs"]
    assert [spec.name for spec in parts.head_step.inputs[-3:]] == ["features.0", "targets", "weights"]


def test_one_tensor_crosses_into_a_residual_block_and_the_mask_is_read_again():
    parts = split(frozen_text(), "^second|^head")
    assert crossing(parts) == [(6, 64)]
    # Computed from a leaf that is at hand: cheaper than keeping it.
    assert "inputs.mask" in {spec.name for spec in parts.head_step.inputs}
    assert "inputs.ids" not in {spec.name for spec in parts.head_step.inputs}


class Shared(nn.Module):
    """The frozen part's output is wide, but the head takes two narrow pieces of it."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(64, 512), nn.Linear(8, 3)

    def forward(self, x):
        wide = torch.relu(self.frozen(x))
        return self.head(wide[:, :8]) + self.head(wide[:, 100:108])


def test_narrow_pieces_cross_instead_of_the_wide_tensor():
    source = Shared(), nn.CrossEntropyLoss(reduction="none"), (torch.randn(4, 64), torch.arange(4) % 3)
    assert crossing(split(source, "head")) == [(8,), (8,)]


class Mixing(nn.Module):
    """Every sample's features depend on the whole batch."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x):
        x = self.frozen(x)
        return self.head(x - x.mean(0))


def test_nothing_is_cut_off_that_depends_on_the_other_samples():
    source = Mixing(), nn.CrossEntropyLoss(reduction="none"), (torch.randn(4, 64), torch.arange(4) % 3)
    parts = split(source, "head")
    # The mean of the batch belongs to the head: a cut before it is right, one behind it would be wrong.
    if parts is not None:
        with torch.no_grad():
            (feature,) = parts.trunk.module(*parts.trunk.example)
        torch.testing.assert_close(feature, source[0].frozen(source[2][0]).detach())


@pytest.mark.parametrize("trainable", ["all", "bias"])
def test_nothing_is_split_where_nothing_worth_it_is_frozen(trainable):
    assert split(frozen_text(), trainable) is None


@pytest.fixture(scope="module", params=["cnn", pytest.param("text", marks=pytest.mark.slow)])
def bundle(request, tmp_path_factory):
    source, trainable = (frozen_cnn(), "last:2") if request.param == "cnn" else (frozen_text(), "^second|^head")
    out = tmp_path_factory.mktemp("split") / request.param
    export_bundle(*source, trainable=trainable, runtimes=("onnxruntime", "torch"), out=out)
    return Bundle(out)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_trunk_and_head_are_the_step(bundle, runtime):
    session = open_session(bundle, runtime)
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters() + np.float32(0.01)
    whole = session.step(parameters, batch, weights)
    features = session.features(batch[0])
    head = session.head()
    inputs = features | ({"mask": batch[0]["mask"]} if isinstance(batch[0], dict) else {})
    parts = head.step(parameters, (inputs, batch[1]), weights)
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    largest = np.abs(whole.gradients).max()
    np.testing.assert_allclose(parts.gradients, whole.gradients, atol=1e-6 * largest)
    assert head.evaluate(parameters, (inputs, batch[1]), weights).loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_the_self_test_runs_the_parts_too(bundle, runtime):
    report = run_self_test(bundle, open_session(bundle, runtime), in_parts=True)
    assert report.ok
    assert report.worst < 1e-5


def test_features_of_a_ragged_batch_are_those_of_its_samples(bundle):
    session = open_session(bundle, "onnxruntime")
    inputs = read_self_test(bundle)[0][0]
    part = {key: array[:3] for key, array in inputs.items()} if isinstance(inputs, dict) else inputs[:3]
    whole, some = session.features(inputs), session.features(part)
    for name, array in some.items():
        assert len(array) == 3 < MICRO_BATCH
        np.testing.assert_allclose(array, whole[name][:3], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_no_split_leaves_the_step_alone(tmp_path):
    export_bundle(*frozen_cnn(), trainable="last:2", out=tmp_path / "whole", split=False)
    bundle = Bundle(tmp_path / "whole")
    assert set(bundle.manifest.program("onnxruntime").graphs) == {"step", "eval", "infer"}
    assert open_session(bundle).head() is None

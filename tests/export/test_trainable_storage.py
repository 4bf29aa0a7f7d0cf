"""Trainable weights in int8: what the programs compute, what the manifest says, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from edgetrain.edge_client import open_session
from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.export import Storage, ToleranceError, UnsupportedError, export_bundle, merge
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.int8 import representable
from support.frozen import cnn_data, frozen_cnn

CALIBRATION = cnn_data(22, seed=9)
INT8 = Storage(trainable="int8", calibration=CALIBRATION)
# The three kernels of 256 elements or more; what is smaller, and the biases, stay float32.
IN_INT8 = {"0.weight": 288, "3.weight": 4608, "5.weight": 384}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The same model with weights in int8 and in float32."""
    folder = tmp_path_factory.mktemp("trainable")
    return tuple(
        Bundle(export_bundle(*frozen_cnn(), out=folder / name, storage=storage))
        for name, storage in (("int8", INT8), ("float32", Storage()))
    )


def test_the_manifest_states_what_is_kept_in_int8_and_what_it_costs(bundles):
    kept, plain = bundles
    entries = kept.manifest.parameters
    assert {entry.name: entry.numel for entry in entries if entry.dtype == "int8"} == IN_INT8
    report = kept.manifest.trainable_storage
    # A byte for each of these elements, and a scale for each of 16, 32 and 12 rows.
    saved = 3 * sum(IN_INT8.values()) - 4 * (16 + 32 + 12)
    assert report.bytes_before == plain.manifest.initial_parameters.size == 4 * plain.manifest.num_parameters
    assert report.bytes_after == kept.manifest.initial_parameters.size == report.bytes_before - saved
    assert report.calibration_samples == 20
    inputs, targets = (half[:20] for half in CALIBRATION)
    module, loss, _ = frozen_cnn()
    with torch.no_grad():
        assert report.loss_before == pytest.approx(float(loss(module.eval()(inputs), targets).mean()), rel=1e-5)
    assert 1e-6 < abs(report.loss_after / report.loss_before - 1) < 0.05
    assert plain.manifest.trainable_storage is None


def test_the_graphs_take_whole_numbers_and_their_scales(bundles):
    for name, graph in bundles[0].manifest.programs[0].graphs.items():
        model = onnx.load_from_string(bundles[0].read(graph.file))
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        for weight in IN_INT8:
            assert types[f"parameters.{weight}"] == onnx.TensorProto.INT8, name
            assert types[f"scales.{weight}"] == onnx.TensorProto.FLOAT, name


def test_loss_and_gradients_are_those_of_the_float_graph_at_the_rounded_weights(bundles):
    kept, plain = (open_session(bundle) for bundle in bundles)
    vector = bundles[1].initial_parameters() + np.random.default_rng(3).normal(0, 0.02, plain.gradients.size)
    vector = vector.astype(np.float32)
    inputs, targets = (half[:3].numpy() for half in CALIBRATION)
    batch, weights = (inputs, targets), np.float32([1, 0.5, 0.25])
    rounded = representable(vector, bundles[0].manifest.parameters)
    assert 1e-3 < np.abs(rounded - vector).max() < 0.02
    got, expected = kept.step(vector, batch, weights), plain.step(rounded, batch, weights)
    assert got.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    np.testing.assert_allclose(got.gradients, expected.gradients, atol=1e-6 * np.abs(expected.gradients).max())
    assert kept.evaluate(vector, batch, weights).loss_sum == pytest.approx(got.loss_sum, rel=1e-6)
    np.testing.assert_allclose(
        kept.infer(vector, inputs)["output"], plain.infer(rounded, inputs)["output"], rtol=1e-4, atol=1e-5
    )
    held = Int8Parameters(bundles[0].manifest.parameters, vector)
    assert kept.step(held, batch, weights).loss_sum == got.loss_sum
    with pytest.raises(DataError, match="keeps its parameters in float32"):
        plain.step(held, batch, weights)


def test_the_self_test_and_the_initial_parameters_are_exact(bundles):
    kept = bundles[0]
    assert run_self_test(kept, open_session(kept)).worst < 1e-5
    initial = kept.initial_parameters()
    np.testing.assert_array_equal(representable(initial, kept.manifest.parameters), initial)
    np.testing.assert_array_equal(representable(bundles[1].initial_parameters(), kept.manifest.parameters), initial)


def test_it_goes_with_a_frozen_trunk_in_int8(tmp_path):
    module, loss, batch = frozen_cnn()
    module[9], module[11] = torch.nn.Linear(12, 32), torch.nn.Linear(32, 3)
    storage = replace(INT8, kind="int8-static")
    bundle = Bundle(export_bundle(module, loss, batch, trainable="last:2", out=tmp_path / "b", storage=storage))
    assert [entry.dtype for entry in bundle.manifest.parameters] == ["int8", *["float32"] * 3]
    assert set(bundle.manifest.programs[0].graphs) == {"trunk", "head_step", "head_eval", "infer"}
    session = open_session(bundle)
    assert run_self_test(bundle, session).worst < 1e-4
    assert run_self_test(bundle, session, in_parts=True).worst < 1e-4
    batch, weights = read_self_test(bundle)
    start = bundle.initial_parameters()
    assert session.evaluate(start, batch, weights).loss_sum == pytest.approx(bundle.manifest.self_test.loss_sum, 1e-4)


def test_a_merged_model_computes_what_the_devices_do(bundles, tmp_path):
    kept = bundles[0]
    vector = kept.initial_parameters() + np.float32(0.003)
    model = merge(kept, vector, tmp_path / "model.onnx")
    import onnxruntime

    inputs = CALIBRATION[0][:4].numpy()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: inputs})
    np.testing.assert_allclose(got, open_session(kept).infer(vector, inputs)["output"], rtol=1e-4, atol=1e-5)
    state = torch.load(merge(kept, vector, tmp_path / "model.pt", module=frozen_cnn()[0]))
    np.testing.assert_array_equal(
        state["0.weight"].numpy().ravel(), representable(vector, kept.manifest.parameters)[:288]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"storage": Storage(trainable="int4")},
            "trainable weights cannot be stored as 'int4', only as: float32, int8",
        ),
        ({"runtimes": ("onnxruntime", "torch")}, "trainable weights as int8 are for onnxruntime only, not for torch"),
        ({"per_sample_clipping": True}, "per-sample clipping needs trainable weights in float32"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(tmp_path, options, message):
    def loss(outputs, targets):
        raise AssertionError("the model was run")

    module, _, batch = frozen_cnn()
    with pytest.raises(UnsupportedError, match=message):
        export_bundle(module, loss, batch, out=tmp_path / "b", **({"storage": INT8} | options))


def test_small_tensors_are_not_worth_it(tmp_path):
    with pytest.raises(UnsupportedError, match="nothing that learns is worth int8"):
        export_bundle(*frozen_cnn(), trainable="last:2", out=tmp_path / "b", storage=INT8)


def test_export_fails_beyond_the_tolerance_and_writes_nothing(tmp_path):
    storage = replace(INT8, max_loss_change=1e-9)
    with pytest.raises(ToleranceError, match="trainable weights as int8 change the loss"):
        export_bundle(*frozen_cnn(), out=tmp_path / "b", storage=storage)
    assert list(tmp_path.iterdir()) == []

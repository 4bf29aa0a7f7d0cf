"""Frozen weights in fewer bytes: exact where it is stored, measured where it is rounded, refused where it costs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from edgetrain.edge_client import open_session
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.export import Storage, ToleranceError, UnsupportedError, export_bundle
from edgetrain.export.errors import BatchError
from edgetrain.export.storage.frozen_weights import round_weight
from edgetrain.protocol.bundle import Bundle
from support.frozen import cnn_data, frozen_cnn, frozen_text

CALIBRATION = cnn_data(22, seed=9)


def export(tmp_path, source, trainable, **options):
    return Bundle(export_bundle(*source, trainable=trainable, out=tmp_path / "b", storage=Storage(**options)))


def stored_types(bundle, graph):
    model = onnx.load_from_string(bundle.read(bundle.manifest.programs[0].graphs[graph].file))
    return {tensor.data_type for tensor in model.graph.initializer if numpy_helper.to_array(tensor).size >= 256}


def test_int8_rounds_each_row_to_127_steps_of_its_own():
    torch.manual_seed(0)
    weight = torch.randn(5, 60) * torch.logspace(-3, 3, 5)[:, None]
    weight[2] = 0
    rounded = round_weight(weight, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((rounded - weight).abs() <= 0.501 * step).all())
    for row, one in zip(rounded, step.flatten(), strict=True):
        assert len(row.unique()) <= 255
        assert float(row.abs().max()) == pytest.approx(127 * float(one), rel=2**-10)
    assert torch.equal(round_weight(rounded, "int8"), rounded)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("float16", TensorProto.FLOAT16), ("int8", TensorProto.INT8)])
@pytest.mark.parametrize("source", ["split", "lora"])
def test_stored_weights_train_as_the_rounded_ones(tmp_path, kind, dtype, source):
    """Without a trunk too: weights that the backward pass reads."""
    trainable = "^second|^head" if source == "split" else "lora:r=2,target=out_proj|linear"
    whole = Bundle(export_bundle(*frozen_text(), trainable=trainable, out=tmp_path / "whole", split=source == "split"))
    bundle = export(tmp_path, frozen_text(), trainable, kind=kind)
    graphs = bundle.manifest.programs[0].graphs
    assert ("trunk" in graphs) != ("step" in graphs)
    assert dtype in stored_types(bundle, "trunk" if "trunk" in graphs else "step")
    session = open_session(bundle)
    assert run_self_test(bundle, session).worst < 1e-5
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters()
    got = session.step(parameters, batch, weights)
    expected = open_session(whole).step(parameters, batch, weights)
    difference = np.linalg.norm(got.gradients - expected.gradients) / np.linalg.norm(expected.gradients)
    # 11 bits, or 1/127 of the largest of a row; a relu that tips over moves a gradient by more.
    assert 0 < difference < (3e-2 if kind == "float16" else 1e-1)
    assert got.loss_sum == pytest.approx(expected.loss_sum, rel=1e-3 if kind == "float16" else 1e-2)
    assert session.evaluate(parameters, batch, weights).loss_sum == pytest.approx(got.loss_sum, rel=1e-5)
    report = bundle.manifest.programs[0].storage
    assert report.kind == kind
    assert report.bytes_after < (0.75 if kind == "float16" else 0.6) * report.bytes_before
    assert bundle.manifest.frozen.quantized["first.linear1.weight"] == kind


@pytest.mark.parametrize("kind", ["int8-static", pytest.param("int8-dynamic", marks=pytest.mark.slow)])
def test_the_trunk_in_int8_arithmetic(tmp_path, kind):
    bundle = export(tmp_path, frozen_cnn(), "last:2", kind=kind, calibration=CALIBRATION)
    report = bundle.manifest.programs[0].storage
    # 22 samples are five whole micro-batches of 4.
    assert report.calibration_samples == 20
    assert abs(report.loss_after / report.loss_before - 1) < 0.05
    assert TensorProto.INT8 in stored_types(bundle, "trunk")
    session = open_session(bundle)
    assert run_self_test(bundle, session).worst < 1e-4
    assert run_self_test(bundle, session, in_parts=True).worst < 1e-4
    assert bundle.manifest.self_test.tolerance == 2e-2
    inputs = cnn_data(4, seed=30)[0]
    with torch.no_grad():
        exact = frozen_cnn()[0].eval()[:9](inputs).numpy()
    (features,) = session.features(inputs.numpy()).values()
    error = np.linalg.norm(features - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1


def test_export_fails_beyond_the_tolerance_and_writes_nothing(tmp_path):
    with pytest.raises(ToleranceError, match=r"change the loss .* allowed are 0\.0%"):
        export(tmp_path, frozen_cnn(), "last:2", kind="int8-static", calibration=CALIBRATION, max_loss_change=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_missing_calibration_data_is_said(tmp_path):
    bundle = export(tmp_path, frozen_cnn(), "last:2", kind="int8-static")
    assert any("no calibration data" in note and "4 samples" in note for note in bundle.manifest.notes)


def test_unrepresentative_calibration_data_is_said(tmp_path):
    inputs, targets = CALIBRATION
    bundle = export(
        tmp_path,
        frozen_cnn(),
        "last:2",
        kind="int8-static",
        calibration=(inputs * 0.01, targets),
    )
    assert any("not like the example batch" in note for note in bundle.manifest.notes)


def test_calibration_data_of_another_shape_is_refused(tmp_path):
    with pytest.raises(BatchError, match=r"calibration data: inputs is torch.float32 \[4, 2, 9, 9\]"):
        export(
            tmp_path, frozen_cnn(), "last:2", kind="int8", calibration=(torch.randn(4, 2, 9, 9), torch.zeros(4).long())
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": Storage(kind="int4")}, "only as: float32, float16, int8"),
        (
            {"storage": Storage(kind="int8"), "runtimes": ("onnxruntime", "torch")},
            "for onnxruntime and executorch, not for torch",
        ),
        (
            {"storage": Storage(kind="int8-static"), "runtimes": ("onnxruntime", "executorch")},
            "otherwise for onnxruntime than for executorch, .*a bundle of its own",
        ),
        (
            {"storage": Storage(kind="int8"), "runtimes": ("executorch",)},
            "not for executorch: XNNPACK multiplies float32.*use int8-static",
        ),
        (
            {
                "storage": Storage(kind="int8-static"),
                "runtimes": ("executorch",),
                "executorch_style": "training-module",
            },
            "TrainingModule runs the whole step",
        ),
        ({"executorch_style": "training-module"}, "needs the runtime executorch"),
        ({"runtimes": ("executorch",), "executorch_style": "eager"}, "only: functional, training-module"),
        ({"storage": Storage(kind="int8"), "per_sample_clipping": True}, "per-sample clipping needs float32"),
        ({"storage": Storage(max_loss_change=0)}, "must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(tmp_path, options, message):
    def loss(outputs, targets):
        raise AssertionError("the model was run")

    module, _, batch = frozen_cnn()
    with pytest.raises(UnsupportedError, match=message):
        export_bundle(module, loss, batch, trainable="last:2", out=tmp_path / "b", **options)


def test_a_quantized_trunk_needs_a_trunk(tmp_path):
    with pytest.raises(UnsupportedError, match="nothing worth a trunk is frozen: use int8"):
        export(tmp_path, frozen_cnn(), "bias", kind="int8-static")


@pytest.mark.parametrize("kind", ["float16", "int8", "int8-static"])
def test_where_nothing_is_frozen_there_is_nothing_to_store(tmp_path, kind):
    with pytest.raises(UnsupportedError, match=f"nothing to store as {kind}"):
        export(tmp_path, frozen_cnn(), "all", kind=kind)


@pytest.mark.slow
def test_the_same_export_gives_the_same_bytes(tmp_path):
    digests = {
        export(tmp_path / str(run), frozen_cnn(), "last:2", kind="int8-static", calibration=CALIBRATION).digest
        for run in range(2)
    }
    assert len(digests) == 1

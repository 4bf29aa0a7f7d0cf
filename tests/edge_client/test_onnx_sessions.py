"""The sessions on ONNX against a float64 numpy reference, and what they refuse."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes import find_runtime, registered_runtimes
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import BundleError
from support.tiny_bundle import (
    CLASSES,
    NUM_PARAMETERS,
    initial_parameters,
    make_data,
    reference_step,
    write_tiny_bundle,
)

RUNTIME = next((name for name in ("onnxruntime", "ort-training") if name in available_runtimes()), None)
pytestmark = pytest.mark.skipif(RUNTIME is None, reason="needs an onnxruntime")


@pytest.fixture
def bundle(tmp_path):
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture
def session(bundle):
    return open_session(bundle)


def test_step_matches_the_numpy_reference(session):
    parameters, (x, y) = initial_parameters(), make_data(4)
    weights = np.array([1, 0.5, 2, 0.25], np.float32)
    expected = reference_step(parameters, x, y, weights)
    result = session.step(parameters, (x, y), weights)
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert result.weight_sum == 3.75
    assert result.metrics["accuracy"] == expected.correct
    np.testing.assert_allclose(result.gradients, expected.gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_a_ragged_batch_counts_only_its_own_samples(session, count):
    parameters, (x, y) = initial_parameters(), make_data(count)
    session.step(parameters, make_data(4, seed=9))  # leaves another batch in the buffers
    expected = reference_step(parameters, x, y, np.ones(count))
    result = session.step(parameters, (x, y))
    assert result.weight_sum == count
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    np.testing.assert_allclose(result.gradients, expected.gradients, rtol=1e-5, atol=1e-6)


def test_parameters_are_bound_not_copied(session):
    parameters, batch = initial_parameters(), make_data(4)
    first = session.step(parameters, batch).loss_sum
    parameters += 0.1
    second = session.step(parameters, batch).loss_sum
    assert second != first
    assert second == pytest.approx(reference_step(parameters, *batch, np.ones(4)).loss_sum, rel=1e-6)


def test_gradients_are_a_view_that_the_next_step_overwrites(session):
    batch = make_data(4)
    first = session.step(initial_parameters(0), batch).gradients
    kept = first.copy()
    second = session.step(initial_parameters(1), batch).gradients
    assert second is first
    assert not np.array_equal(first, kept)


def test_evaluate_and_infer(session):
    parameters, (x, y) = initial_parameters(), make_data(3)
    expected = reference_step(parameters, x, y, np.ones(3))
    result = session.evaluate(parameters, (x, y))
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert (result.weight_sum, result.metrics["accuracy"]) == (3, expected.correct)
    outputs = session.infer(parameters, x)
    assert outputs["logits"].shape == (3, CLASSES)
    np.testing.assert_allclose(outputs["logits"], expected.logits, rtol=1e-5, atol=1e-6)


def test_weights_of_samples_reach_their_tokens(tmp_path):
    session = open_session(write_tiny_bundle(tmp_path / "tokens", tokens=6))
    parameters, (x, y) = initial_parameters(), make_data(4, tokens=6)
    per_sample = np.array([1, 0, 2, 0.5], np.float32)
    per_token = np.repeat(per_sample[:, None], 6, axis=1)
    a = session.step(parameters, (x, y), per_sample)
    assert a.weight_sum == 21
    gradients = a.gradients.copy()
    b = session.step(parameters, (x, y), per_token)
    np.testing.assert_array_equal(gradients, b.gradients)
    per_token[1, 3] = 7
    c = session.step(parameters, (x, y), per_token)
    expected = reference_step(parameters, x, y, per_token)
    np.testing.assert_allclose(c.gradients, expected.gradients, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_structured_inputs_and_an_input_that_the_graph_dropped(tmp_path, kind):
    session = open_session(write_tiny_bundle(tmp_path / kind, kind=kind, unused_input=True))
    parameters, (x, y) = initial_parameters(), make_data(4)
    ids = np.arange(4)
    inputs = (x, ids) if kind == "tuple" else {"id": ids, "x": x}
    expected = reference_step(parameters, x, y, np.ones(4))
    assert session.step(parameters, (inputs, y)).loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    with pytest.raises(DataError, match=rf"inputs as a {kind} of .* got one array"):
        session.step(parameters, (x, y))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.uint8, np.bool_])
def test_dtypes_that_convert_to_float32(session, dtype):
    x, y = make_data(4)
    x = (x > 0).astype(dtype)
    expected = reference_step(initial_parameters(), x, y, np.ones(4))
    assert session.step(initial_parameters(), (x, y)).loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_labels_of_any_integer_width(session, dtype):
    x, y = make_data(4)
    same = session.step(initial_parameters(), (x, y)).loss_sum
    assert session.step(initial_parameters(), (x, y.astype(dtype))).loss_sum == same


X, Y = make_data(4)
BAD_BATCHES = {
    "shape": ((X[:, :4], Y), r"inputs: expected shape \[N, 5\], got \[4, 4\]"),
    "rank": ((X[0], Y), r"inputs: expected shape \[N, 5\], got \[5\]"),
    "scalar": ((np.array(1, np.float32), Y), r"inputs: expected shape \[N, 5\], got \[\]"),
    "float labels": ((X, Y.astype(np.float32)), "targets: expected int64, got float32"),
    "wide integers": ((X.astype(np.int64), Y), "inputs: expected float32, got int64"),
    "text": ((X.astype(str), Y), "inputs: expected float32, got <U"),
    "objects": ((X.astype(object), Y), "inputs: expected float32, got object"),
    "complex": ((X.astype(np.complex64), Y), "inputs: expected float32, got complex64"),
    "range": ((X, np.full(4, 2**64 - 1, np.uint64)), "targets: values .* do not fit int64"),
    "nan": ((np.where(np.arange(4)[:, None] == 2, np.float32(np.nan), X), Y), "inputs: sample 2 .* NaN"),
    "overflow": ((X.astype(np.float64) * 1e300, Y), "inputs: sample 0 .* infinite"),
    "lengths": ((X, Y[:3]), r"different lengths: \[3, 4\]"),
    "too many": ((np.concatenate([X, X]), np.concatenate([Y, Y])), "8 samples .* micro-batch of 4"),
    "none": ((X[:0], Y[:0]), "at least one sample"),
    "list": ((X.tolist(), Y), "inputs: expected a numpy array, got a list"),
    "no pair": (X, r"a batch is \(inputs, targets\)"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_named(session, case):
    batch, message = BAD_BATCHES[case]
    with pytest.raises(DataError, match=message):
        session.step(initial_parameters(), batch)
    # and the session still works
    expected = reference_step(initial_parameters(), X, Y, np.ones(4)).loss_sum
    assert session.step(initial_parameters(), (X, Y)).loss_sum == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3, np.float32), "3 weights for 4 samples"),
        (np.ones((4, 2), np.float32), r"weights: expected shape \[N\] or \[N\], got \[4, 2\]"),
        (np.array([1, np.inf, 1, 1], np.float32), "weights: sample 1"),
        ([1, 1, 1, 1], "weights: expected a float32 numpy array, got a list"),
    ],
)
def test_bad_weights_are_named(session, weights, message):
    with pytest.raises(DataError, match=message):
        session.step(initial_parameters(), (X, Y), weights)


@pytest.mark.parametrize(
    "parameters",
    [
        np.zeros(NUM_PARAMETERS - 1, np.float32),
        np.zeros(NUM_PARAMETERS, np.float64),
        np.zeros((NUM_PARAMETERS, 1), np.float32),
        np.zeros(2 * NUM_PARAMETERS, np.float32)[::2],
        [0.0] * NUM_PARAMETERS,
    ],
)
def test_bad_parameters_are_named(session, parameters):
    with pytest.raises(DataError, match=f"parameters: expected a contiguous float32 vector of {NUM_PARAMETERS}"):
        session.step(parameters, (X, Y))


def test_an_archive_gives_the_same_numbers(tmp_path, session):
    archive = open_session(write_tiny_bundle(tmp_path / "tiny.edge"))
    a = session.step(initial_parameters(), (X, Y)).gradients
    b = archive.step(initial_parameters(), (X, Y)).gradients
    np.testing.assert_array_equal(a, b)


def test_a_flipped_bit_in_the_graph_is_a_bundle_error(bundle):
    path = bundle / RUNTIME / "step.onnx"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"step\.onnx is corrupt"):
        open_session(bundle)


def replace_graph(bundle, name, data):
    """Puts another graph in, with a manifest that vouches for it."""
    (bundle / RUNTIME / f"{name}.onnx").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    (program,) = (program for program in manifest["programs"] if program["runtime"] == RUNTIME)
    entry = program["graphs"][name]["file"]
    entry["sha256"], entry["size"] = hashlib.sha256(data).hexdigest(), len(data)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_file_that_is_no_model_is_a_session_error(bundle):
    replace_graph(bundle, "step", b"no model at all")
    with pytest.raises(SessionError, match=rf"cannot load {RUNTIME}/step\.onnx"):
        open_session(bundle)


def test_a_graph_that_is_not_the_manifests_is_a_session_error(bundle):
    replace_graph(bundle, "step", (bundle / RUNTIME / "infer.onnx").read_bytes())
    with pytest.raises(SessionError, match=rf"puts of {RUNTIME}/step\.onnx are not the manifest's"):
        open_session(bundle)


def test_a_graph_that_is_not_there_is_named(tmp_path):
    session = open_session(write_tiny_bundle(tmp_path / "t", graphs=("step",)))
    with pytest.raises(SessionError, match=f"no 'eval' graph for {RUNTIME}, only: step"):
        session.evaluate(initial_parameters(), (X, Y))


def test_choosing_a_runtime(bundle, tmp_path):
    assert {"onnxruntime", "ort-training", "torch"} <= set(registered_runtimes())
    assert open_session(bundle).runtime == open_session(bundle, RUNTIME).runtime == RUNTIME
    assert open_session(Bundle(bundle), threads=0).manifest.name == "tiny"
    with pytest.raises(BundleError, match=r"no program for runtime 'torch'.*--runtime torch"):
        open_session(bundle, "torch")
    for choose in (find_runtime, lambda name: open_session(bundle, name)):
        with pytest.raises(SessionError, match="no runtime is called 'abacus'; known are: onnxruntime"):
            choose("abacus")
    with pytest.raises(SessionError, match=r"none of the runtimes .* no runtime is called 'abacus'"):
        open_session(write_tiny_bundle(tmp_path / "other", runtimes=("abacus",)))
    with pytest.raises(SessionError, match="threads is -1"):
        open_session(bundle, threads=-1)
    with pytest.raises(BundleError, match="no such bundle"):
        open_session(tmp_path / "nowhere")


def test_a_bundle_for_a_newer_onnxruntime_is_refused(tmp_path):
    path = write_tiny_bundle(tmp_path / "t", minimum_version="99.0")
    with pytest.raises(SessionError, match=r'pip install "onnxruntime.*>=99\.0"'):
        open_session(path)


@pytest.mark.skipif("onnxruntime" not in available_runtimes(), reason="needs plain onnxruntime")
def test_an_old_onnxruntime_is_refused(tmp_path, monkeypatch):
    bundle = write_tiny_bundle(tmp_path / "t", runtimes=("onnxruntime",))
    monkeypatch.setattr("onnxruntime.__version__", "1.21.1")
    with pytest.raises(SessionError, match=r'onnxruntime 1.21.1 is too old.*pip install "onnxruntime>=1.22"'):
        open_session(bundle)

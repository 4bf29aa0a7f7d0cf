"""`edgetrain testvectors`: what it writes fits together, by means that share no code with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edgetrain.cli.testvectors import command
from edgetrain.edge_client import available_runtimes
from edgetrain.protocol import Limits, decode
from support.tiny_bundle import initial_parameters, reference_step, write_tiny_bundle

pytestmark = pytest.mark.skipif("onnxruntime" not in available_runtimes(), reason="needs plain onnxruntime")


@pytest.fixture
def written(tmp_path):
    bundle = write_tiny_bundle(tmp_path / "tiny")
    done = CliRunner().invoke(command, [str(bundle), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    return tmp_path / "out"


def test_the_gradients_are_those_of_the_batch(written):
    index = json.loads((written / "vectors.json").read_text())
    manifest = json.loads((written / "bundle/manifest.json").read_text())
    data = (written / "bundle" / index["batch"]).read_bytes()
    x, y, weights = (
        np.frombuffer(data, dtype, count, offset).reshape(shape)
        for dtype, count, offset, shape in _layout(manifest["batch"])
    )
    expected = reference_step(initial_parameters(), x, y, weights)
    gradients = np.fromfile(written / "gradients.f32", "<f4")
    np.testing.assert_allclose(gradients, expected.gradients, rtol=1e-4, atol=1e-6)
    assert index["expected"]["loss_sum"] == pytest.approx(expected.loss_sum, rel=1e-5)
    delta = np.fromfile(written / "delta.f32", "<f4")
    np.testing.assert_allclose(delta, -0.1 * expected.gradients / weights.sum(), rtol=1e-3, atol=1e-6)


def _layout(batch):
    offset = 0
    for spec in (*batch["inputs"]["leaves"], *batch["targets"]["leaves"], batch["weights"]):
        count = int(np.prod(spec["shape"]))
        yield spec["dtype"], count, offset, spec["shape"]
        offset += count * np.dtype(spec["dtype"]).itemsize


def test_the_updates_decode_to_the_delta(written):
    index = json.loads((written / "vectors.json").read_text())
    delta = np.fromfile(written / "delta.f32", "<f4")
    for update in index["updates"]:
        payload = (written / update["file"]).read_bytes()
        assert len(payload) == update["bytes"]
        decoded = decode(payload, Limits(max_parameters=len(delta))).dense()
        if update["codec"] == "dense|float32":
            np.testing.assert_array_equal(decoded, delta)
        kept = decoded != 0
        np.testing.assert_allclose(decoded[kept], delta[kept], atol=np.abs(delta).max() / 100)


def test_an_existing_directory_is_left_alone(written):
    before = sorted(path.name for path in written.iterdir())
    done = CliRunner().invoke(command, ["-o", str(written)])
    assert done.exit_code == 2
    assert "is there already" in done.output
    assert sorted(path.name for path in written.iterdir()) == before

"""Mixed precision in torch: close to float32, float32 parameters, loss scaling; refused elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from edgetrain.edge_client import open_session
from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.torch_precision import LossScale
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.export import export_bundle
from edgetrain.protocol.bundle import Bundle
from support.frozen import frozen_cnn


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("precision") / "cnn"
    export_bundle(*frozen_cnn(), trainable="all", runtimes=("torch",), out=out)
    return Bundle(out)


# Half of the last significant bit: 2^-12 and 2^-9, through four layers.
@pytest.mark.parametrize(("precision", "most"), [("fp16", 5e-3), ("bf16", 5e-2)])
def test_a_step_in_16_bits_is_near_the_step(bundle, precision, most):
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters()
    exact = open_session(bundle, "torch").step(parameters, batch, weights)
    session = open_session(bundle, "torch", precision=precision)
    rounded = session.step(parameters, batch, weights)
    error = np.linalg.norm(rounded.gradients - exact.gradients) / np.linalg.norm(exact.gradients)
    assert 1e-5 < error < most
    assert rounded.loss_sum == pytest.approx(exact.loss_sum, rel=most)
    assert rounded.weight_sum == pytest.approx(exact.weight_sum, rel=1e-6)
    for name, value in exact.metrics.items():
        np.testing.assert_allclose(rounded.metrics[name], value, rtol=1e-6)
    assert rounded.gradients.dtype == np.float32
    assert run_self_test(bundle, session).ok


def test_small_gradients_survive_by_scaling(bundle):
    """Weights of 1e-6 make gradients that float16 would flush to zero."""
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters()
    tiny = (weights * 1e-6).astype(np.float32)
    exact = open_session(bundle, "torch").step(parameters, batch, tiny).gradients.copy()
    scaled = open_session(bundle, "torch", precision="fp16").step(parameters, batch, tiny).gradients
    assert np.linalg.norm(scaled - exact) < 1e-2 * np.linalg.norm(exact)


def test_an_overflow_halves_the_scale_until_it_fits(bundle):
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters()
    large = (weights * 1e4).astype(np.float32)
    exact = open_session(bundle, "torch").step(parameters, batch, large).gradients.copy()
    session = open_session(bundle, "torch", precision="fp16")
    scaled = session.step(parameters, batch, large).gradients
    assert np.linalg.norm(scaled - exact) < 1e-2 * np.linalg.norm(exact)


def test_the_scale_is_a_power_of_two_that_grows_back():
    scale = LossScale(start=2, patience=3)
    assert [scale.overflowed(), scale.overflowed(), scale.overflowed()] == [True, True, False]
    assert scale.value == 1
    for _ in range(6):
        scale.succeeded()
    assert scale.value == 4


def test_other_runtimes_refuse_it(tmp_path):
    export_bundle(*frozen_cnn(), trainable="all", runtimes=("onnxruntime",), out=tmp_path / "b", split=False)
    with pytest.raises(SessionError, match=r"onnxruntime computes in fp32, not in bf16: mixed precision is for the"):
        open_session(tmp_path / "b", "onnxruntime", precision="bf16")
    with pytest.raises(SessionError, match="none of the runtimes"):
        open_session(tmp_path / "b", precision="fp16")

"""Every runtime that can run here, on bundles from the real exporter, against eager torch."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes import find_runtime, registered_runtimes
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.training.selftest import run_self_test
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import BundleError
from support.exported import CONFIG, MICRO_BATCH, RUNTIMES, SEED


@pytest.fixture(params=[name for name in RUNTIMES if name in available_runtimes()])
def runtime(request):
    return request.param


@pytest.fixture
def session(case, runtime):
    return open_session(case.bundle, runtime)


def assert_close(actual, expected, share=2e-5):
    """Within a share of the largest element."""
    assert np.abs(actual - expected).max() <= share * np.abs(expected).max()


def test_a_ragged_weighted_step_is_eager_torchs(case, session):
    batch, weights = case.batch(session.manifest)
    result = session.step(Bundle(case.bundle).initial_parameters(), batch, weights)
    assert result.loss_sum == pytest.approx(float(case.reference["step.loss_sum"]), rel=1e-5)
    assert result.weight_sum == pytest.approx(float(case.reference["step.weight_sum"]), rel=1e-6)
    for entry in session.manifest.parameters:
        part = slice(entry.offset, entry.offset + entry.numel)
        assert_close(result.gradients[part], case.reference["step.gradients"][part], 1e-4)


def test_evaluate_and_infer_are_eager_torchs(case, session):
    batch, weights = case.batch(session.manifest)
    parameters = Bundle(case.bundle).initial_parameters()
    step, result = session.step(parameters, batch, weights), session.evaluate(parameters, batch, weights)
    assert result.loss_sum == pytest.approx(float(case.reference["step.loss_sum"]), rel=1e-5)
    assert result.weight_sum == step.weight_sum
    np.testing.assert_equal(result.metrics, step.metrics)
    outputs = session.infer(parameters, batch[0])
    (array,) = outputs.values()
    assert array.shape == case.reference["infer"].shape
    assert_close(array, case.reference["infer"])


def test_training_is_eager_torchs(case, session):
    """Optimizer, accumulation over micro-batches, ragged batches, weights, schedule and clipping together."""
    dataset = load_dataset(case.data, session.manifest)
    start = Bundle(case.bundle).initial_parameters()
    progress = []
    result = train(session, start, dataset, CONFIG, seed=SEED, on_step=progress.append)
    assert_close(result.parameters, case.reference["trained"], 1e-4)
    np.testing.assert_allclose([p.loss for p in progress], case.reference["losses"], rtol=1e-4)
    assert max(p.gradient_norm for p in progress) > CONFIG.max_grad_norm
    assert evaluate(session, result.parameters, dataset).loss < evaluate(session, start, dataset).loss
    assert CONFIG.batch_size % MICRO_BATCH


def test_the_self_test_passes(case, session):
    report = run_self_test(Bundle(case.bundle), session)
    assert report.ok, report
    assert report.worst < 1e-4


def test_gradients_do_not_add_up_from_step_to_step(case, session):
    batch, weights = case.batch(session.manifest)
    parameters = Bundle(case.bundle).initial_parameters()
    first = session.step(parameters, batch, weights).gradients.copy()
    np.testing.assert_array_equal(session.step(parameters, batch, weights).gradients, first)


def test_parameters_that_may_not_be_written_are_fine(case, session):
    batch, weights = case.batch(session.manifest)
    parameters = Bundle(case.bundle).initial_parameters()
    expected = session.step(parameters, batch, weights).loss_sum
    parameters.flags.writeable = False
    assert session.step(parameters, batch, weights).loss_sum == expected


def test_an_index_out_of_range_is_a_data_error(exported_folder, runtime):
    session = open_session(exported_folder / "text" / "bundle.edge", runtime)
    ids = np.full((4, 7), 20)
    with pytest.raises(DataError, match="an index in the batch is out of range"):
        session.step(
            Bundle(exported_folder / "text" / "bundle.edge").initial_parameters(),
            ({"ids": ids, "mask": np.ones_like(ids)}, ids % 20),
        )


def test_without_a_name_the_first_program_that_can_run_is_taken(case):
    programs = [program.runtime for program in Bundle(case.bundle).manifest.programs]
    expected = next(name for name in programs if name in available_runtimes())
    assert open_session(case.bundle).runtime == expected


@pytest.mark.parametrize("name", sorted(set(RUNTIMES) - set(available_runtimes())))
def test_a_runtime_that_is_not_here_says_what_to_install(case, name):
    assert name in registered_runtimes()
    assert "pip install" in find_runtime(name).available()
    # Or the bundle, too, was made where the runtime is missing.
    with pytest.raises((SessionError, BundleError), match=r"pip install|--runtime"):
        open_session(case.bundle, name)

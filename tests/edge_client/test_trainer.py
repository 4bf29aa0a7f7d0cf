"""The local trainer on the hand-written bundle, against the same loop in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.errors import DataError, TrainingError
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.trainer import batches, count_steps, evaluate, train
from edgetrain.protocol.training import ScheduleConfig, TrainingConfig
from support.tiny_bundle import (
    NUM_PARAMETERS,
    initial_parameters,
    make_data,
    reference_step,
    write_tiny_bundle,
)

pytestmark = pytest.mark.skipif(not available_runtimes(), reason="needs a runtime")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return open_session(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="module")
def dataset():
    return Dataset(*make_data(50))


def step_mean(parameters, dataset, indices):
    (x, y), weights = dataset.take(indices)
    weights = np.ones(len(y)) if weights is None else weights
    result = reference_step(parameters, x, y, weights)
    return result.gradients / result.weight_sum, result.loss_sum / result.weight_sum


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 16, 64])
def test_micro_batches_of_any_size_equal_one_big_batch(tmp_path, micro_batch):
    session = open_session(write_tiny_bundle(tmp_path / "b", micro_batch=micro_batch))
    x, y = make_data(64)
    weights = np.random.default_rng(3).uniform(0, 2, 64).astype(np.float32)
    start = initial_parameters()
    result = train(session, start, Dataset(x, y, weights), TrainingConfig(batch_size=64, learning_rate=1.0), seed=0)
    expected = reference_step(start, x, y, weights)
    gradient = start.astype(np.float64) - result.parameters
    mean = expected.gradients / expected.weight_sum
    assert np.abs(gradient - mean).max() <= 1e-6 * np.abs(start).max()
    assert result.loss == pytest.approx(expected.loss_sum / expected.weight_sum, rel=1e-6)
    assert result.metrics["accuracy"] == pytest.approx(expected.correct / expected.weight_sum, rel=1e-6)
    assert (result.steps, result.num_examples, result.stopped) == (1, 64, None)


def test_per_token_losses_divide_by_the_tokens(tmp_path):
    session = open_session(write_tiny_bundle(tmp_path / "b", tokens=5))
    x, y = make_data(6, tokens=5)
    weights = (np.arange(30).reshape(6, 5) % 3 > 0).astype(np.float32)
    start = initial_parameters()
    result = train(session, start, Dataset(x, y, weights), TrainingConfig(batch_size=6, learning_rate=1.0), seed=0)
    expected = reference_step(start, x, y, weights)
    np.testing.assert_allclose(start - result.parameters, expected.gradients / 20, rtol=1e-4, atol=1e-6)


def test_everything_together_equals_the_numpy_loop(session, dataset):
    config = TrainingConfig(
        epochs=3,
        batch_size=11,
        learning_rate=0.3,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.01,
        max_grad_norm=0.4,
        proximal_mu=0.1,
        schedule=ScheduleConfig(name="cosine", warmup_steps=4),
    )
    correction = np.random.default_rng(5).normal(0, 0.01, NUM_PARAMETERS).astype(np.float32)
    received = initial_parameters()
    p, v, norms, rates = received.astype(np.float64), None, [], []
    plan = list(batches(50, config, seed=7))
    assert [len(part) for part in plan] == [11, 11, 11, 11, 6] * 3
    for step, indices in enumerate(plan):
        g, _ = step_mean(p.astype(np.float32), dataset, indices)
        norms.append(np.linalg.norm(g))
        g = g * min(1, 0.4 / (norms[-1] + 1e-6)) + correction + 0.1 * (p - received) + 0.01 * p
        v = g if v is None else 0.9 * v + g
        factor = (step + 1) / 4 if step < 4 else (1 + np.cos(np.pi * (step - 4) / 11)) / 2
        rates.append(0.3 * factor)
        p = p - rates[-1] * (g + 0.9 * v)
    told = []
    result = train(session, received, dataset, config, seed=7, gradient_correction=correction, on_step=told.append)
    np.testing.assert_allclose(result.parameters, p, rtol=2e-4, atol=2e-5)
    assert [progress.step for progress in told] == list(range(1, 16))
    assert {progress.total_steps for progress in told} == {15}
    assert [progress.learning_rate for progress in told] == pytest.approx(rates)
    assert [progress.gradient_norm for progress in told] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.4 > min(norms)  # clipping was at work, but not always
    np.testing.assert_array_equal(received, initial_parameters())


def test_same_seed_same_bytes(session, dataset):
    config = TrainingConfig(epochs=2, batch_size=8, momentum=0.9)
    runs = [train(session, initial_parameters(), dataset, config, seed=seed).parameters for seed in (1, 1, 2)]
    assert runs[0].tobytes() == runs[1].tobytes() != runs[2].tobytes()


def test_it_learns(session):
    train_set, test_set = Dataset(*make_data(300)), Dataset(*make_data(301, seed=8))
    before = evaluate(session, initial_parameters(), test_set)
    config = TrainingConfig(epochs=30, batch_size=10, learning_rate=0.1, momentum=0.9)
    result = train(session, initial_parameters(), train_set, config, seed=0)
    after = evaluate(session, result.parameters, test_set)
    assert before.metrics["accuracy"] < 0.6
    assert after.metrics["accuracy"] > 0.95
    x, y = make_data(301, seed=8)
    expected = reference_step(result.parameters, x, y, np.ones(301))
    assert after.loss == pytest.approx(expected.loss_sum / 301, rel=1e-5)
    assert after.metrics["accuracy"] == pytest.approx(expected.correct / 301)
    assert after.num_examples == 301


def test_every_epoch_visits_every_sample_once():
    config = TrainingConfig(epochs=3, batch_size=7)
    order = np.concatenate(list(batches(20, config, seed=0))).reshape(3, 20)
    assert (np.sort(order, axis=1) == np.arange(20)).all()
    assert not np.array_equal(order[0], order[1])


@pytest.mark.parametrize(("max_steps", "steps"), [(0, 10), (4, 4), (99, 10)])
def test_max_steps(session, dataset, max_steps, steps):
    config = TrainingConfig(epochs=2, batch_size=10, max_steps=max_steps)
    assert count_steps(50, config) == steps
    assert train(session, initial_parameters(), dataset, config, seed=0).steps == steps


@pytest.mark.parametrize(("answer", "reason"), [(False, "stopped"), ("battery at 12 %", "battery at 12 %")])
def test_it_stops_after_the_last_whole_step(session, dataset, answer, reason):
    config = TrainingConfig(batch_size=10, learning_rate=0.3)
    # Three micro-batches a step: the eighth question comes in the middle of the third step.
    answers = iter([True] * 7 + [answer])
    ticks = iter([10.0, 14.5])
    stopped = train(
        session,
        initial_parameters(),
        dataset,
        config,
        seed=0,
        may_continue=lambda: next(answers),
        clock=lambda: next(ticks),
    )
    assert (stopped.steps, stopped.stopped, stopped.seconds) == (2, reason, 4.5)
    two = train(
        session,
        initial_parameters(),
        dataset,
        TrainingConfig(batch_size=10, learning_rate=0.3, max_steps=2),
        seed=0,
    )
    np.testing.assert_array_equal(stopped.parameters, two.parameters)
    assert stopped.loss == two.loss


def test_stopped_before_the_first_step(session, dataset):
    result = train(session, initial_parameters(), dataset, TrainingConfig(), seed=0, may_continue=lambda: False)
    assert result.steps == 0
    assert np.isnan(result.loss)
    assert result.metrics == {}
    np.testing.assert_array_equal(result.parameters, initial_parameters())


def test_a_batch_of_zero_weights_takes_no_step(session):
    x, y = make_data(8)
    weights = np.zeros(8, np.float32)
    weights[0] = 1
    config = TrainingConfig(batch_size=4, weight_decay=0.5)
    assert train(session, initial_parameters(), Dataset(x, y, weights), config, seed=0).steps == 1


def test_divergence_names_the_step(session, dataset):
    start = initial_parameters()
    with pytest.raises(TrainingError, match=r"of optimizer step 3 is not finite \(learning rate 1e\+38\).*Lower"):
        train(session, start, dataset, TrainingConfig(batch_size=50, epochs=5, learning_rate=1e38), seed=0)
    start[0] = np.nan
    with pytest.raises(TrainingError, match="the loss of optimizer step 1 is not finite"):
        train(session, start, dataset, TrainingConfig(), seed=0)


def test_vectors_of_another_length_are_refused(session, dataset):
    with pytest.raises(DataError, match=f"parameters: expected a contiguous float32 vector of {NUM_PARAMETERS}"):
        train(session, np.zeros(3, np.float32), dataset, TrainingConfig(), seed=0)
    with pytest.raises(DataError, match="gradient_correction: expected"):
        train(
            session,
            initial_parameters(),
            dataset,
            TrainingConfig(),
            seed=0,
            gradient_correction=np.zeros(3, np.float32),
        )

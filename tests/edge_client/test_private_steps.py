"""DP-SGD on the device: clipping by sample, chance in the batches, noise once per step, fixed denominators."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgetrain.edge_client.errors import DataError, SessionError, TrainingError
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.private_steps import GRID, MARGIN, PrivateSteps, planned_release
from edgetrain.edge_client.training.trainer import train
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.privacy import Keystream, Release
from edgetrain.protocol.training import SamplePrivacy, TrainingConfig

KEY = b"a key of thirty-two bytes, known"
PRIVACY = SamplePrivacy(clip_norm=0.3, noise_multiplier=1.5)


@pytest.fixture(scope="module")
def session(private_bundle):
    return open_session(Bundle(private_bundle), "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def parameters(private_bundle):
    return Bundle(private_bundle).initial_parameters()


def make_data(count, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 5)).astype(np.float32)
    return Dataset(x, np.argmax(x[:, :3], axis=1))


def gradient_of_sample(parameters, x, y):
    """By hand, in float64."""
    w1, b1, w2, b2 = np.split(parameters.astype(np.float64), [35, 42, 63])
    w1, w2 = w1.reshape(7, 5), w2.reshape(3, 7)
    h = np.tanh(w1 @ x + b1)
    z = w2 @ h + b2
    p = np.exp(z - z.max())
    p /= p.sum()
    dz = p - np.eye(3)[y]
    da = (w2.T @ dz) * (1 - h**2)
    return np.concatenate([np.outer(da, x).ravel(), da, np.outer(dz, h).ravel(), dz])


@pytest.mark.parametrize(
    ("runtime", "clip_norm"), [("onnxruntime", 0.2), ("onnxruntime", 0.7), ("onnxruntime", 100.0), ("torch", 0.7)]
)
def test_a_session_clips_sample_by_sample(private_bundle, parameters, runtime, clip_norm):
    session = open_session(Bundle(private_bundle), runtime, threads=1)
    data = make_data(5)
    weights = np.array([1, 0.5, 1, 0, 2], np.float32)
    result = session.step_clipped(parameters, (data.inputs, data.targets), weights, clip_norm=clip_norm)
    gradients = [w * gradient_of_sample(parameters, x, y)
                 for x, y, w in zip(data.inputs, data.targets, weights, strict=True)]  # fmt: skip
    norms = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(result.norms, norms, rtol=1e-4, atol=1e-6)
    wanted = sum(g * min(1.0, clip_norm / n) for g, n in zip(gradients, norms, strict=True) if n)
    np.testing.assert_allclose(result.gradients, wanted, rtol=1e-4, atol=1e-5)
    plain = session.step(parameters, (data.inputs, data.targets), weights)
    assert result.loss_sum == pytest.approx(plain.loss_sum, rel=1e-5)
    assert result.weight_sum == plain.weight_sum == 4.5
    assert result.metrics.keys() == plain.metrics.keys()


def test_a_session_takes_no_senseless_norm_and_names_the_missing_graph(session, parameters, tiny_bundle):
    data = make_data(2)
    for clip_norm in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="clip_norm"):
            session.step_clipped(parameters, (data.inputs, data.targets), clip_norm=clip_norm)
    without = open_session(Bundle(tiny_bundle), "onnxruntime", threads=1)
    with pytest.raises(SessionError, match="per_sample_clipping"):
        without.step_clipped(parameters, (data.inputs, data.targets), clip_norm=1.0)


def test_batches_are_poisson_samples(session):
    config = TrainingConfig(batch_size=20, epochs=50, privacy=PRIVACY)
    steps = PrivateSteps(session, config, PRIVACY, random_bytes=Keystream(KEY))
    batches = list(steps.batches(100))
    assert len(batches) == 50 * 5
    sizes = np.array([len(batch) for batch in batches])
    # Binomial(100, 0.2): mean 20, variance 16.
    assert abs(sizes.mean() - 20) < 5 * math.sqrt(16 / len(sizes))
    assert 10 < sizes.var() < 24
    counts = np.bincount(np.concatenate(batches), minlength=100)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert all((np.diff(batch) > 0).all() for batch in batches)


def test_the_noise_is_added_once_per_step_and_the_denominator_is_what_was_expected(session):
    config = TrainingConfig(batch_size=40, privacy=PRIVACY)
    steps = PrivateSteps(session, config, PRIVACY, random_bytes=Keystream(KEY))
    clipped_sum = np.linspace(-3, 3, 66).astype(np.float32)
    means = np.array([steps.mean_gradient(clipped_sum, 200) for _ in range(2000)])
    deviation = 1.5 * 0.3 * (1 + MARGIN) / 40
    np.testing.assert_allclose(means.mean(axis=0), clipped_sum / 40, atol=5 * deviation / math.sqrt(2000))
    normalized = (means - clipped_sum / 40) / deviation
    assert stats.kstest(normalized.ravel(), "norm").pvalue > 1e-4
    # With fewer samples than the batch, all take part: the denominator is their number.
    few = PrivateSteps(session, config, PRIVACY, random_bytes=Keystream(KEY))
    assert abs(np.mean([few.mean_gradient(clipped_sum, 10) for _ in range(500)], axis=0) * 10 - clipped_sum).max() < 0.2


def test_a_training_is_sums_of_clipped_gradients_and_noise(session, parameters):
    """Replayed by hand with the same bytes: Poisson batches over several micro-batches, one noise each."""
    data, config = make_data(60), TrainingConfig(batch_size=20, learning_rate=0.5, privacy=PRIVACY)
    result = train(session, parameters, data, config, seed=0, random_bytes=Keystream(KEY))
    assert result.steps == 3
    replay = PrivateSteps(session, config, PRIVACY, random_bytes=Keystream(KEY))
    current = parameters
    for batch in replay.batches(60):
        assert len(batch) > session.manifest.micro_batch
        gradients = [gradient_of_sample(current, data.inputs[i], data.targets[i]) for i in batch]
        total = sum(g * min(1.0, 0.3 / np.linalg.norm(g)) for g in gradients).astype(np.float32)
        current = current - np.float32(0.5) * replay.mean_gradient(total, 60)
    np.testing.assert_allclose(result.parameters, current, rtol=1e-4, atol=1e-5)


def test_the_seed_of_the_plan_decides_nothing(session, parameters):
    data, config = make_data(40), TrainingConfig(batch_size=10, privacy=PRIVACY)
    one = train(session, parameters, data, config, seed=7)
    other = train(session, parameters, data, config, seed=7)
    assert (one.parameters != other.parameters).all()


def test_an_empty_batch_is_a_step_of_noise(session, parameters):
    data, config = make_data(500), TrainingConfig(batch_size=1, max_steps=20, privacy=PRIVACY)
    sizes = []
    replay = PrivateSteps(session, config, PRIVACY, random_bytes=Keystream(KEY))
    sizes = [len(batch) for batch in replay.batches(500)]
    assert 0 in sizes
    result = train(session, parameters, data, config, seed=0, random_bytes=Keystream(KEY))
    assert result.steps == 20


def test_one_sample_that_breaks_the_model_changes_nothing_for_the_others(session, parameters):
    """Its gradient is not finite: it is left out, wherever in a micro-batch it stands."""
    data = make_data(8)
    config = TrainingConfig(batch_size=8, privacy=PRIVACY)
    steps = PrivateSteps(session, config, PRIVACY)
    honest = steps.step(parameters, data, np.array([1, 2, 3, 5])).gradients.copy()
    for bad in (0, 4, 7):
        weights = np.ones(8, np.float32)
        weights[bad] = 3e38
        broken = Dataset(data.inputs, data.targets, weights)
        batch, weight = broken.take(np.array([bad]))
        assert not np.isfinite(session.step_clipped(parameters, batch, weight, clip_norm=0.3).norms).any()
        got = steps.step(parameters, broken, np.sort(np.array([1, 2, 3, 5, bad]))).gradients
        np.testing.assert_allclose(got, honest, rtol=1e-5, atol=1e-7)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        steps.step(np.full_like(parameters, np.nan), data, np.arange(4))


def test_two_neighbouring_sums_differ_by_no_more_than_the_margin_allows(session, parameters):
    """The sensitivity in float32 arithmetic, over many pairs of batches that differ by one sample."""
    data = make_data(64, seed=3)
    config = TrainingConfig(batch_size=64, privacy=PRIVACY)
    steps = PrivateSteps(session, config, PRIVACY)
    rng = np.random.default_rng(5)

    def total(indices):
        found = np.zeros(66, np.float32)
        for start in range(0, len(indices), 8):
            found += steps.step(parameters, data, indices[start : start + 8]).gradients
        return np.rint(found.astype(np.float64) / (0.3 / GRID))

    worst = 0.0
    for _ in range(60):
        batch = np.flatnonzero(rng.random(64) < 0.6)
        without = np.delete(batch, rng.integers(len(batch)))
        worst = max(worst, float(np.linalg.norm(total(batch) - total(without))) / GRID)
    assert 0.99 < worst < 1 + MARGIN / 100


def test_what_a_training_costs():
    config = TrainingConfig(batch_size=20, epochs=3, privacy=PRIVACY)
    assert planned_release(100, config) == Release(
        mechanism="gaussian", noise_multiplier=1.5, sampling="poisson", sampling_rate=0.2, steps=15
    )
    assert planned_release(20, config) == Release(mechanism="gaussian", noise_multiplier=1.5, steps=3)

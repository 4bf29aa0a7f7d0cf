"""DP-FedAvg: what goes into the sum, what is divided by what, and what makes no sense."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.strategies import Contribution, Setting, described, make_strategy
from edgetrain.coordinator.strategies.dp_fedavg import CLIP_NORM, GRID, private_mean
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.privacy import Keystream, Release

KEY = b"a key of thirty-two bytes, known"
OPTIONS = {"name": "dp-fedavg", "clip_norm": 1.0, "noise_multiplier": 1.0, "clients_per_round": 4}


def strategy(*, noise_multiplier=1.0, clip_norm=1.0, clients=4, quantile=0.0, count_noise=1.0, sampling="none"):
    return private_mean(
        release=Release(mechanism="gaussian", noise_multiplier=noise_multiplier, sampling=sampling,
                        sampling_rate=1.0 if sampling == "none" else 0.1),
        clip_norm=clip_norm, clients_per_round=clients, population=0, quantile=quantile, norm_learning_rate=0.2,
        count_noise=count_noise, random_bytes=Keystream(KEY),
    )  # fmt: skip


def contribution(name, vector, *, num_examples=1, indices=None, length=None, unclipped=None):
    values = np.asarray(vector, np.float32)
    update = SparseOrDense(length or len(values), None if indices is None else np.asarray(indices, np.int64), values)
    return Contribution(name, num_examples, 1, update, unclipped=unclipped)


def run(made, contributions, parameters, state=None):
    partial = made.init(len(parameters), state or {})
    for one in contributions:
        partial = made.fold(partial, one)
    return made.finish(partial, parameters, state or {})


def test_long_deltas_are_clipped_and_everyone_counts_the_same():
    """Hardly any noise: the mean of (0.6, 0.8) twice over, whatever was claimed, over 4 expected clients."""
    made = strategy(noise_multiplier=1e-9)
    after, _ = run(made, [contribution("a", [3.0, 4.0], num_examples=1_000_000), contribution("b", [0.6, 0.8])],
                   np.zeros(2, np.float32))  # fmt: skip
    np.testing.assert_allclose(after, [1.2 / 4, 1.6 / 4], rtol=1e-6)


def test_sparse_updates_are_the_same_vectors():
    dense = run(strategy(), [contribution("a", [0.0, 0.5, 0.0])], np.zeros(3, np.float32))[0]
    sparse = run(strategy(), [contribution("a", [0.5], indices=[1], length=3)], np.zeros(3, np.float32))[0]
    np.testing.assert_array_equal(dense, sparse)


@pytest.mark.parametrize("sampling", ["none", "poisson", "fixed"])
def test_the_noise_is_as_large_as_it_says(sampling):
    """Standard deviation noise_multiplier x sensitivity / clients; replacing a client doubles the sensitivity."""
    made = strategy(noise_multiplier=0.7, clip_norm=3.0, clients=5, sampling=sampling)
    after, _ = run(made, [], np.zeros(40_000, np.float32))
    deviation = 0.7 * 3.0 * (2 if sampling == "fixed" else 1) / 5
    assert stats.kstest(after / deviation, "norm").pvalue > 1e-4


def test_the_order_of_arrival_does_not_matter():
    rng = np.random.default_rng(0)
    deltas = [contribution(str(n), rng.normal(size=50)) for n in range(6)]
    one = run(strategy(), deltas, np.zeros(50, np.float32))[0]
    other = run(strategy(), deltas[::-1], np.zeros(50, np.float32))[0]
    np.testing.assert_array_equal(one, other)


def test_no_client_moves_the_sum_by_more_than_the_clip_norm():
    """In integers, exactly."""
    rng = np.random.default_rng(1)
    made = strategy(clip_norm=0.37)
    for scale in (1e-6, 0.37, 1.0, 1e30):
        partial = made.fold(made.init(1000, {}), contribution("a", rng.normal(size=1000) * scale))
        assert sum(int(value) ** 2 for value in partial.total) <= int(GRID) ** 2


def test_the_clip_norm_follows_the_quantile():
    """Norms 1 … 20 in turn; with the median asked for, the norm settles near 10.5 from 1 and from 100."""
    for begin in (1.0, 100.0):
        made = strategy(noise_multiplier=0.5, clip_norm=begin, clients=20, quantile=0.5, count_noise=1.0)
        state = {}
        for _ in range(60):
            norm = made.private.clip_norm(state)
            deltas = [contribution(str(n), [float(n)], unclipped=n <= norm) for n in range(1, 21)]
            _, state = run(made, deltas, np.zeros(1, np.float32), state)
        assert 7 < float(state[CLIP_NORM]) < 14


def test_counting_takes_its_share_of_the_noise():
    """z = 1 with 2 sigma_b = 2: the deltas get 1 / sqrt(1 - 1/4)."""
    made = strategy(noise_multiplier=1.0, clients=1, quantile=0.5, count_noise=1.0)
    after, state = run(made, [], np.zeros(40_000, np.float32))
    assert stats.kstest(after * math.sqrt(0.75), "norm").pvalue > 1e-4
    # One draw of the count: C exp(-0.2 (0.5 + count / 2 - 0.5)).
    assert state[CLIP_NORM] == pytest.approx(math.exp(-0.1 * round(-10 * math.log(float(state[CLIP_NORM])))))


def test_other_strategies_state_is_passed_on():
    made = strategy(quantile=0.5)
    _, state = run(made, [], np.zeros(3, np.float32), {"fedadam/m": np.ones(3, np.float32)})
    assert set(state) == {"fedadam/m", CLIP_NORM}


def test_what_cannot_be_clipped_is_refused_and_changes_nothing():
    made = strategy()
    partial = made.init(3, {})
    for wrong in (contribution("a", [1.0, 2.0]), contribution("a", [np.inf, 0, 0]), contribution("a", [np.nan, 0, 0])):
        with pytest.raises(UpdateRefused):
            made.fold(partial, wrong)
    assert not partial.total.any()
    assert partial.balance == 0


def test_it_stands_within_server_optimizers():
    made = make_strategy({"name": "fedadam", "learning_rate": 0.03, "inner": OPTIONS}, Setting(goal=4))
    assert described(made) == "fedadam(dp-fedavg)"
    assert made.private.release == Release(mechanism="gaussian", noise_multiplier=1.0)
    assert made.private.clip_norm({}) == 1.0


@pytest.mark.parametrize(
    ("table", "setting", "message"),
    [
        ({"name": "norm-bound", "max_norm": 1.0, "inner": OPTIONS}, Setting(goal=4), "clips every delta by itself"),
        (OPTIONS, Setting(goal=5), "make them equal"),
        (OPTIONS, Setting(goal=4, only_sums=True), "clients clip and add shares of the noise"),
        (OPTIONS | {"sampling": "poisson"}, Setting(goal=4), "needs the population"),
        (OPTIONS | {"population": 9}, Setting(goal=4), "without sampling"),
        (OPTIONS | {"quantile": 0.5, "count_noise": 0.4}, Setting(goal=4), "leaves no noise for the deltas"),
        (OPTIONS | {"noise_multiplier": 0.0}, Setting(goal=4), "noise_multiplier"),
        ({"name": "dp-fedavg"}, Setting(goal=4), "missing"),
    ],
)
def test_senseless_stacks_are_refused(table, setting, message):
    with pytest.raises(ConfigError, match=message):
        make_strategy(table, setting)

"""Strategies that average, against fractions and closed forms."""

from fractions import Fraction

import numpy as np
import pytest

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.strategies import Setting, make_strategy
from edgetrain.coordinator.strategies.fednova import accumulation_norm
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.training import ScheduleConfig, TrainingConfig
from support.contributions import contribution, run_deltas, run_round

DELTAS = ([0.5, -1.0, 0.25], [1.5, 0.75, -0.125], [-2.0, 3.0, 0.0])
EXAMPLES = (3, 5, 8)


def three(**kwargs):
    return [
        contribution(f"c{i}", delta, examples=count, **kwargs)
        for i, (delta, count) in enumerate(zip(DELTAS, EXAMPLES, strict=True))
    ]


def weighted_mean(deltas, weights):
    """In exact fractions."""
    return [
        float(sum(Fraction(w) * Fraction(d[j]) for d, w in zip(deltas, weights, strict=True)) / sum(weights))
        for j in range(len(deltas[0]))
    ]


def test_fedavg_is_the_mean_weighted_by_examples():
    after, state = run_round(make_strategy("fedavg"), [1, 1, 1], three())
    np.testing.assert_array_equal(after, np.float32(1) + np.float32(weighted_mean(DELTAS, EXAMPLES)))
    assert state == {}


def test_fedavg_unweighted():
    after, _ = run_round(make_strategy({"name": "fedavg", "weighted": False}), [0, 0, 0], three())
    np.testing.assert_array_equal(after, np.float32(weighted_mean(DELTAS, (1, 1, 1))))


@pytest.mark.parametrize(
    "table",
    [
        "fedavg",
        "fednova",
        "scaffold",
        "fedbuff",
        "median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "bulyan",
        "geometric-median",
        {"name": "norm-bound", "max_norm": 1.0, "inner": {"name": "fedyogi", "inner": "fednova"}},
    ],
)
def test_the_order_of_arrival_changes_not_one_bit(table):
    rng = np.random.default_rng(0)
    items = [
        contribution(
            f"c{i}",
            rng.normal(size=50),
            examples=int(rng.integers(1, 99)),
            steps=i + 1,
            control=rng.normal(size=50),
        )
        for i in range(11)
    ]
    first, state = run_round(make_strategy(table), np.zeros(50), items)
    for _ in range(5):
        again, other = run_round(make_strategy(table), np.zeros(50), [items[i] for i in rng.permutation(11)])
        assert again.tobytes() == first.tobytes()
        assert state.keys() == other.keys()
        assert all(state[key].tobytes() == other[key].tobytes() for key in state)


def test_fedsgd_makes_clients_take_one_step_on_all_their_data():
    strategy = make_strategy("fedsgd")
    config = strategy.training(TrainingConfig(epochs=7, batch_size=8, momentum=0.9, learning_rate=0.3))
    assert (config.epochs, config.max_steps, config.momentum, config.learning_rate) == (1, 1, 0.0, 0.3)
    assert config.batch_size >= 10_000_000


def test_fedprox_sets_mu_and_averages():
    strategy = make_strategy({"name": "fedprox", "mu": 0.25})
    assert strategy.training(TrainingConfig(epochs=3)) == TrainingConfig(epochs=3, proximal_mu=0.25)
    np.testing.assert_array_equal(
        run_round(strategy, [0, 0, 0], three())[0], np.float32(weighted_mean(DELTAS, EXAMPLES))
    )


# --- FedNova -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_accumulation_norm_has_the_papers_closed_forms(steps):
    plain = TrainingConfig(learning_rate=0.05)
    assert accumulation_norm(plain, steps) == pytest.approx(steps)
    rho = 0.9
    momentum = TrainingConfig(learning_rate=0.05, momentum=rho)
    closed = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    assert accumulation_norm(momentum, steps) == pytest.approx(closed)
    alpha = 0.05 * 0.4
    proximal = TrainingConfig(learning_rate=0.05, proximal_mu=0.4)
    assert accumulation_norm(proximal, steps) == pytest.approx((1 - (1 - alpha) ** steps) / alpha)


def test_the_accumulation_norm_of_a_schedule_is_the_sum_of_its_factors():
    schedule = ScheduleConfig(name="step", step_size=2, gamma=0.5)
    assert accumulation_norm(TrainingConfig(schedule=schedule), 6) == pytest.approx(2 * (1 + 0.5 + 0.25))


def test_fednova_undoes_unequal_numbers_of_steps():
    # Clients that walk along constant gradients g_i, learning rate 1/2: delta = -steps / 2 * g.
    gradients = np.array([[1.0, 2.0], [3.0, -4.0], [0.5, 0.0]])
    steps, examples = (1, 4, 10), (2, 1, 1)
    training = TrainingConfig(learning_rate=0.5)
    items = [
        contribution(f"c{i}", -count / 2 * g, steps=count, examples=n, training=training)
        for i, (g, count, n) in enumerate(zip(gradients, steps, examples, strict=True))
    ]
    after, _ = run_round(make_strategy("fednova"), [0, 0], items)
    # tau_eff * learning_rate * weighted mean gradient, with tau_eff = (2*1 + 4 + 10) / 4 = 4.
    np.testing.assert_allclose(after, -4 * 0.5 * (np.array(examples) @ gradients) / 4, rtol=1e-6)


def test_fednova_with_equal_steps_is_fedavg():
    nova, _ = run_round(make_strategy("fednova"), [0, 0, 0], three(steps=6))
    average, _ = run_round(make_strategy("fedavg"), [0, 0, 0], three(steps=6))
    np.testing.assert_allclose(nova, average, rtol=1e-6)


def test_fednova_refuses_absurd_steps_and_stays_as_it_was():
    strategy = make_strategy("fednova")
    partial = strategy.init(2, {})
    for steps in (0, 2**50):
        with pytest.raises(UpdateRefused, match="steps"):
            strategy.fold(partial, contribution("c", [1, 1], steps=steps))
    assert partial.normalized.count == partial.norms == 0


# --- FedBuff -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2**-0.5, 0.5]),
        ({"exponent": 1.0}, [1, 0.5, 0.25]),
        ({"staleness": "constant"}, [1, 1, 1]),
        ({"staleness": "hinge", "hinge_slope": 2.0, "hinge_grace": 1.0}, [1, 1, 1 / 5]),
    ],
)
def test_fedbuff_weighs_by_staleness_and_divides_by_the_buffer(options, expected):
    items = [contribution(f"c{age}", [6.0], staleness=age) for age in (0, 1, 3)]
    after, _ = run_round(make_strategy({"name": "fedbuff", **options}), [0], items)
    assert after[0] == pytest.approx(6 * sum(expected) / 3, rel=1e-6)


def test_fedbuff_refuses_what_is_too_old():
    strategy = make_strategy({"name": "fedbuff", "max_staleness": 2})
    with pytest.raises(UpdateRefused, match="3 versions old, allowed are 2"):
        strategy.fold(strategy.init(1, {}), contribution("c", [1.0], staleness=3))


# --- norm-bound --------------------------------------------------------------------------------------


def test_norm_bound_clips_long_updates_and_leaves_short_ones():
    strategy = make_strategy({"name": "norm-bound", "max_norm": 1.0})
    after, _ = run_round(strategy, [0, 0], [contribution("a", [3.0, 4.0]), contribution("b", [0.3, -0.4])])
    np.testing.assert_allclose(after, [(0.6 + 0.3) / 2, (0.8 - 0.4) / 2], rtol=1e-6)


def test_norm_bound_may_refuse():
    strategy = make_strategy({"name": "norm-bound", "max_norm": 1.0, "action": "refuse"})
    with pytest.raises(UpdateRefused, match="norm 5"):
        strategy.fold(strategy.init(2, {}), contribution("a", [3.0, 4.0]))


def test_norm_bound_shields_a_robust_strategy_too():
    inner = {"name": "trimmed-mean", "byzantine": 0.0}
    bounded = make_strategy({"name": "norm-bound", "max_norm": 5.0, "inner": inner})
    assert bounded.needs_all
    np.testing.assert_allclose(run_deltas(bounded, [[30, 40], [3, 4], [-6, -8]]), [1, 4 / 3], rtol=1e-6)


# --- senseless stacks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"name": "fedadam", "inner": "fedavgm"}, "two server optimizers"),
        (
            {"name": "fedadam", "inner": {"name": "norm-bound", "max_norm": 1, "inner": "fedyogi"}},
            "two server",
        ),
        ({"name": "norm-bound", "max_norm": 1, "inner": "scaffold"}, "control variates"),
        (
            {"name": "norm-bound", "max_norm": 1, "inner": {"name": "norm-bound", "max_norm": 2}},
            "smaller bound",
        ),
        ({"name": "fedavg", "inner": "median"}, "no setting called `inner`"),
        ({"name": "norm-bound"}, "missing: `max_norm`"),
        ({"name": "fedprox", "mu": 0}, "> 0"),
        ({"name": "fedadam", "inner": 3}, "strategy.inner"),
        ({"mu": 1}, "needs a name"),
        ("fedsuper", "not known; there is: bulyan"),
    ],
)
def test_senseless_tables_are_refused_with_the_reason(table, reason):
    with pytest.raises(ConfigError, match=reason):
        make_strategy(table)


@pytest.mark.parametrize(
    ("table", "setting", "reason"),
    [
        ("scaffold", Setting(training=TrainingConfig(momentum=0.5)), "momentum"),
        ("fednova", Setting(only_sums=True), "own norm"),
        ("fedbuff", Setting(only_sums=True), "own staleness"),
        ("fednova", Setting(training=TrainingConfig(learning_rate=1.0, proximal_mu=1.0)), "overshoot"),
        (
            {"name": "fedadam", "inner": "scaffold"},
            Setting(training=TrainingConfig(proximal_mu=0.5)),
            "proximal",
        ),
        ({"name": "norm-bound", "max_norm": 1}, Setting(only_sums=True), "let the clients clip"),
    ],
)
def test_strategies_refuse_settings_they_cannot_work_in(table, setting, reason):
    with pytest.raises(ConfigError, match=reason):
        make_strategy(table, setting)

"""Server optimizers against numbers worked out by hand and scalar loops."""

import numpy as np
import pytest

from edgetrain.coordinator.strategies import make_strategy
from support.contributions import contribution, run_round

CHANGES = ([1.0, -2.0, 0.0], [0.5, 2.0, 0.02], [-1.5, 0.25, 0.0])


def run(table, changes=CHANGES):
    """Parameters after every round whose average is `change`."""
    strategy, parameters, state, history = make_strategy(table), np.zeros(3, np.float32), {}, []
    for change in changes:
        parameters, state = run_round(strategy, parameters, [contribution("a", change)], state)
        history.append(parameters)
    return np.array(history), state


def test_fedavgm_by_hand():
    history, _ = run({"name": "fedavgm", "momentum": 0.5, "learning_rate": 2.0})
    # v: 1, 1, -1 in the first element; -2, 1, 0.75 in the second; 0, .02, .01 in the third.
    np.testing.assert_allclose(history, [[2, -4, 0], [4, -2, 0.04], [2, -0.5, 0.06]], rtol=1e-6)


def test_fedadam_first_step_by_hand():
    history, _ = run({"name": "fedadam", "learning_rate": 0.1, "tau": 0.5, "beta2": 0.75}, CHANGES[:1])
    # m = 0.1 change; v = 0.75 * 0.25 + 0.25 * change^2 = 0.4375, 1.1875, 0.1875.
    expected = [0.1 * 0.1 / (0.4375**0.5 + 0.5), -0.1 * 0.2 / (1.1875**0.5 + 0.5), 0]
    np.testing.assert_allclose(history[0], expected, rtol=1e-6)


SECOND_MOMENTS = {
    "fedadam": lambda v, d: 0.9 * v + 0.1 * d * d,
    "fedyogi": lambda v, d: v - 0.1 * d * d * ((v > d * d) * 1.0 - (v < d * d) * 1.0),
    "fedadagrad": lambda v, d: v + d * d,
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_adaptive_optimizers_over_rounds(name):
    table = {"name": name, "learning_rate": 0.3, "beta1": 0.6, "tau": 0.01}
    if name != "fedadagrad":
        table["beta2"] = 0.9
    history, _ = run(table)
    for j in range(3):
        x, m, v = 0.0, 0.0, 0.0001
        for t, change in enumerate(CHANGES):
            m = 0.6 * m + 0.4 * change[j]
            v = SECOND_MOMENTS[name](v, change[j])
            x += 0.3 * m / (v**0.5 + 0.01)
            assert history[t][j] == pytest.approx(x, rel=2e-5, abs=1e-7)


def test_a_server_optimizer_goes_around_any_strategy():
    strategy = make_strategy({"name": "fedavgm", "momentum": 0.5, "inner": "median"})
    assert strategy.needs_all
    parameters, state = np.zeros(1, np.float32), {}
    for _ in range(2):
        rows = [contribution(f"c{value}", [value]) for value in (1, 2, 100)]
        parameters, state = run_round(strategy, parameters, rows, state)
    assert parameters[0] == 2 + (0.5 * 2 + 2)


def test_stacked_strategies_keep_each_others_state():
    strategy = make_strategy({"name": "fedavgm", "inner": "scaffold"})
    rows = [contribution("a", [1.0, 1.0, 1.0], control=[2.0, 0.0, 0.0])]
    _, state = run_round(strategy, np.zeros(3), rows)
    assert set(state) == {"fedavgm/v", "scaffold/control_sum", "scaffold/members"}
    np.testing.assert_array_equal(strategy.control(3, state), [2, 0, 0])

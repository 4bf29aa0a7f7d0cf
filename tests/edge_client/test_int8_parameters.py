"""Weights in int8 move, on average, by what the float weights of the same training would move."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.edge_client.errors import TrainingError
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters
from edgetrain.edge_client.training.local_parameters import RoundedParameters
from edgetrain.edge_client.training.optimizers import sgd
from edgetrain.protocol.int8 import representable
from edgetrain.protocol.manifest import ParameterEntry

ROWS, LENGTH = 20, 30
SIZE = ROWS * LENGTH + ROWS
ENTRIES = (
    ParameterEntry(name="weight", shape=(ROWS, 5, LENGTH // 5), offset=0, dtype="int8"),
    ParameterEntry(name="bias", shape=(ROWS,), offset=ROWS * LENGTH),
)
WEIGHT, BIAS = slice(0, ROWS * LENGTH), slice(ROWS * LENGTH, SIZE)


def random(seed: int, scale: float = 1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=SIZE).astype(np.float32)


def trained(start, gradient, *, steps: int, seed: int, rate: float = 0.1, **options):
    local = RoundedParameters(ENTRIES, start, np.random.default_rng(seed))
    optimizer = sgd(**options)
    state = optimizer.init()
    for _ in range(steps):
        state = local.descend(optimizer, gradient, state, rate)
    return local.trained()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}])
def test_many_steps_far_below_one_unit_move_weights_as_float_sgd_does(options):
    """The scale is about 0.02, a step about 0.0005."""
    start, gradient = random(1), random(2, 0.005)
    optimizer = sgd(**options)
    expected, state = start, optimizer.init()
    for _ in range(40):
        expected, state = optimizer.apply(expected, gradient, state, 0.1)
    runs = np.stack([trained(start, gradient, steps=40, seed=seed, **options) for seed in range(60)])
    moved, should = runs.mean(0) - start, expected - start
    # Noise of the mean; nearest rounding would not move at all.
    noise = runs.std(0).mean() / np.sqrt(len(runs))
    assert np.abs(moved - should)[WEIGHT].mean() < 1.5 * noise
    slope = (moved @ should) / (should @ should)
    assert slope == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(runs[0][BIAS], expected[BIAS], rtol=1e-5)


def test_a_whole_step_is_the_gradient_of_the_integers_divided_by_the_square_of_the_scale():
    start = representable(random(3), ENTRIES)
    whole, _, scales = (array.astype(np.float64) for array in Int8Parameters(ENTRIES, start).graph_inputs())
    scales = scales.reshape(-1, 1, 1)
    gradient = np.zeros(SIZE, np.float32)
    # Of the weight: such that the integers' gradient over the squared scale is 3.
    gradient[WEIGHT] = np.broadcast_to(3 * scales, whole.shape).ravel()
    of_integers = gradient[WEIGHT].reshape(whole.shape) * scales
    local = RoundedParameters(ENTRIES, start, np.random.default_rng(0))
    # Rows whose largest value would not fit any more get another scale.
    local.descend(sgd(), gradient, sgd().init(), 1.0)
    moved, _, after = local.given.graph_inputs()
    same = after == scales.astype(np.float32).ravel()
    assert 2 < same.sum() < ROWS
    np.testing.assert_allclose(moved[same], (whole - of_integers / scales**2)[same], atol=1.01)


def test_the_same_seed_rounds_the_same_way():
    start, gradient = random(4), random(5, 0.01)
    first, again, other = (trained(start, gradient, steps=5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_steps_nothing_has_moved():
    start = random(6)
    assert np.array_equal(trained(start, start, steps=0, seed=0), start)


@pytest.mark.parametrize("start", [0.0, 1e-3])
def test_rows_of_zeros_and_rows_that_outgrow_their_range_get_other_scales(start):
    """As those of a fresh LoRA adapter, and of a last layer that starts small."""
    begin = np.full(SIZE, start, np.float32)
    gradient = random(7)
    end = trained(begin, gradient, steps=20, seed=0, rate=0.5)
    # A step of the last scale at most, and the noise of the way there.
    assert np.abs(end - (begin - 10 * gradient))[WEIGHT].max() < 0.3 * np.abs(gradient).max()


def test_a_weight_that_is_not_finite_is_an_error():
    gradient = np.full(SIZE, 1e30, np.float32)
    with np.errstate(over="ignore"), pytest.raises(TrainingError, match="weight is not finite after a step"):
        trained(random(8), gradient, steps=1, seed=0, rate=1e20)


def test_one_byte_an_element():
    local = Int8Parameters(
        (ParameterEntry(name="w", shape=(100, 5000), offset=0, dtype="int8"),), np.ones(500_000, "f4")
    )
    assert sum(array.nbytes for array in local.graph_inputs()) == 500_000 + 400

"""SGD and clipping against torch.optim.SGD and torch's clip_grad_norm_."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.edge_client.training.optimizers import OptimizerState, clipping_factor, norm_of, sgd
from edgetrain.protocol.errors import ConfigError

VARIANTS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_equal_torch_sgd(variant):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=50).astype(np.float32)
    gradients = rng.normal(size=(10, 50)).astype(np.float32)
    tensor = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.SGD([tensor], lr=0.1, **VARIANTS[variant])
    optimizer = sgd(**VARIANTS[variant])
    parameters, state = start.copy(), optimizer.init()
    for step, gradient in enumerate(gradients):
        rate = 0.1 / (1 + step)
        reference.param_groups[0]["lr"] = rate
        tensor.grad = torch.from_numpy(gradient.copy())
        reference.step()
        parameters, state = optimizer.apply(parameters, gradient, state, rate)
    np.testing.assert_allclose(parameters, tensor.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert parameters.dtype == np.float32


def test_two_momentum_steps_by_hand():
    optimizer = sgd(momentum=0.5)
    one = np.ones(1, np.float32)
    parameters, state = optimizer.apply(one, one * 2, optimizer.init(), 0.1)
    assert parameters[0] == pytest.approx(0.8)
    parameters, state = optimizer.apply(parameters, one * 4, state, 0.1)
    assert state.velocity[0] == 5
    assert parameters[0] == pytest.approx(0.3)


def test_arguments_are_left_alone():
    optimizer = sgd(momentum=0.9, nesterov=True, weight_decay=0.1)
    parameters, gradient, velocity = (np.full(3, value, np.float32) for value in (1, 2, 3))
    optimizer.apply(parameters, gradient, OptimizerState(velocity), 0.1)
    assert (parameters[0], gradient[0], velocity[0]) == (1, 2, 3)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ConfigError, match="nesterov needs a momentum"):
        sgd(nesterov=True)


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 50.0])
def test_clipping_equals_torch(max_norm):
    torch = pytest.importorskip("torch")
    gradient = np.random.default_rng(1).normal(size=100).astype(np.float32)
    tensors = [torch.zeros(40, requires_grad=True), torch.zeros(60, requires_grad=True)]
    tensors[0].grad, tensors[1].grad = (
        torch.from_numpy(gradient[:40].copy()),
        torch.from_numpy(gradient[40:].copy()),
    )
    expected_norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    norm = norm_of(gradient)
    assert norm == pytest.approx(float(expected_norm), rel=1e-6)
    clipped = gradient * np.float32(clipping_factor(norm, max_norm))
    np.testing.assert_allclose(clipped, torch.cat([t.grad for t in tensors]).numpy(), rtol=1e-6)


def test_clipping_by_hand_and_off():
    gradient = np.array([3, 4], np.float32)
    assert norm_of(gradient) == 5
    np.testing.assert_allclose(gradient * clipping_factor(5.0, 1.0), [0.6, 0.8], rtol=1e-6)
    assert clipping_factor(5.0, 0) == clipping_factor(5.0, 7.0) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_along_the_mean_of_a_sum_in_place(variant):
    """The sum over 3 samples and its divisor, against their mean in fresh memory."""
    rng = np.random.default_rng(2)
    start, total, velocity = rng.normal(size=(3, 50)).astype(np.float32)
    optimizer = sgd(**VARIANTS[variant])
    state = OptimizerState(velocity)
    expected, after = optimizer.apply(start.copy(), total / 3, state, 0.1)
    parameters, given = start.copy(), total.copy()
    new, changed = optimizer.apply(parameters, total, state, 0.1, 3.0, np.empty(50, np.float32))
    assert new is parameters
    np.testing.assert_allclose(parameters, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(total, given)
    np.testing.assert_allclose(changed.velocity, after.velocity, rtol=1e-6)

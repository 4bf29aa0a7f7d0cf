"""Optimizers: pure functions on flat float32 vectors.

An optimizer is a value built by a factory that closes over its hyper-parameters. Its state is plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgetrain.edge_client.runtimes.base import Vector
from edgetrain.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer remembers between steps."""

    # Running sum of gradients, [num_parameters]; None before the first step and without momentum.
    velocity: Vector | None = None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`apply(parameters, gradient, state, learning_rate) -> (parameters, state)`, changing no argument."""

    init: Callable[[], OptimizerState]
    apply: Callable[[Vector, Vector, OptimizerState, float], tuple[Vector, OptimizerState]]


def sgd(*, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent exactly as `torch.optim.SGD` does it (dampening 0).

        g = gradient + weight_decay * parameters
        v = momentum * v + g                       (v = g in the first step)
        parameters -= learning_rate * (g + momentum * v if nesterov else v)

    Momentum: Polyak 1964; Nesterov's in the form of Sutskever et al. 2013.

    Raises:
        ConfigError: Nesterov without momentum.
    """
    if nesterov and momentum == 0:
        raise ConfigError("nesterov needs a momentum above 0, e.g. momentum = 0.9")

    def apply(
        parameters: Vector, gradient: Vector, state: OptimizerState, learning_rate: float
    ) -> tuple[Vector, OptimizerState]:
        if weight_decay:
            gradient = gradient + np.float32(weight_decay) * parameters
        direction, velocity = gradient, state.velocity
        if momentum:
            velocity = gradient.copy() if velocity is None else np.float32(momentum) * velocity + gradient
            direction = gradient + np.float32(momentum) * velocity if nesterov else velocity
        return parameters - np.float32(learning_rate) * direction, OptimizerState(velocity)

    return Optimizer(init=OptimizerState, apply=apply)


def clip_by_global_norm(gradient: Vector, max_norm: float) -> tuple[Vector, float]:
    """Scales a gradient down to `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Args:
        gradient: float32 [num_parameters].
        max_norm: 0 for no clipping.

    Returns:
        The clipped gradient, and the norm before clipping.
    """
    norm = float(np.linalg.norm(gradient))
    # torch's own epsilon.
    scale = max_norm / (norm + 1e-6)
    if max_norm > 0 and scale < 1:
        return gradient * np.float32(scale), norm
    return gradient, norm

"""Optimizers: pure functions on flat float32 vectors.

An optimizer is a value built by a factory that closes over its hyper-parameters. Its state is plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.vectors import Vector


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer remembers between steps."""

    # Running sum of gradients, [num_parameters]; None before the first step and without momentum.
    velocity: Vector | None = None


class Apply(Protocol):
    """One step: the new parameters and state."""

    def __call__(
        self,
        parameters: Vector,
        gradient: Vector,
        state: OptimizerState,
        learning_rate: float,
        divisor: float = 1.0,
        room: Vector | None = None,
        /,
    ) -> tuple[Vector, OptimizerState]:
        """Along `gradient / divisor`. With `room`, a vector as long, it changes the parameters; else no argument."""
        ...


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An initial state, and a step."""

    init: Callable[[], OptimizerState]
    apply: Apply


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
        parameters: Vector,
        gradient: Vector,
        state: OptimizerState,
        learning_rate: float,
        divisor: float = 1.0,
        room: Vector | None = None,
        /,
    ) -> tuple[Vector, OptimizerState]:
        if divisor != 1 and (weight_decay or momentum):
            gradient, divisor = gradient / np.float32(divisor), 1.0
        if weight_decay:
            gradient = gradient + np.float32(weight_decay) * parameters
        direction, velocity = gradient, state.velocity
        if momentum:
            velocity = gradient.copy() if velocity is None else np.float32(momentum) * velocity + gradient
            direction = gradient + np.float32(momentum) * velocity if nesterov else velocity
        change = np.multiply(direction, np.float32(learning_rate / divisor), out=room)
        # The change is this function's own, but for one in the caller's room, which is for the next step again.
        new = np.subtract(parameters, change, out=change if room is None else parameters)
        return new, OptimizerState(velocity) if momentum else state

    return Optimizer(init=OptimizerState, apply=apply)


def norm_of(gradient: Vector) -> float:
    """The Euclidean norm."""
    return float(np.linalg.norm(gradient))


def clipping_factor(norm: float, max_norm: float) -> float:
    """What scales a gradient of that norm down to `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Args:
        norm: finite.
        max_norm: 0 for no clipping.

    Returns:
        Above 0; 1 if the gradient is left as it is.
    """
    # torch's own epsilon.
    scale = max_norm / (norm + 1e-6)
    return scale if max_norm > 0 and scale < 1 else 1.0

"""The parameters of one local training between its steps: a float32 vector, or weights in int8."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edgetrain.edge_client.runtimes.base import Parameters
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters, any_in_int8
from edgetrain.edge_client.training.optimizers import Optimizer, OptimizerState
from edgetrain.protocol.manifest import ParameterEntry
from edgetrain.protocol.vectors import Vector

# Of the generator that rounds, beside the seed.
_STREAM = 2
# Elements that the optimizer works on at a time.
_BLOCK = 1 << 16
_NOTHING = OptimizerState()


class LocalParameters(Protocol):
    """What the loop needs of them."""

    @property
    def given(self) -> Parameters:
        """What a session takes."""
        ...

    def vector(self) -> Vector:
        """As float32 [num_parameters]; not to be changed."""
        ...

    def descend(
        self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float, divisor: float = 1.0
    ) -> OptimizerState:
        """One step of the optimizer, which treats every element for itself, along `gradient / divisor`."""
        ...

    def trained(self) -> Vector:
        """Where the training has led, float32 [num_parameters], fresh memory."""
        ...


def local_parameters(entries: tuple[ParameterEntry, ...], received: Vector, seed: int) -> LocalParameters:
    """Where a local training starts.

    Args:
        entries: the manifest's parameters.
        received: float32 [num_parameters]; left as it is.
        seed: of the rounding.
    """
    if any_in_int8(entries):
        return RoundedParameters(entries, received, np.random.Generator(np.random.PCG64([seed, _STREAM])))
    return FloatParameters(received)


class _Step:
    """One step of an optimizer on pieces of a vector."""

    def __init__(
        self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float, divisor: float
    ) -> None:
        self._optimizer = optimizer
        self._gradient = gradient
        self._divisor = divisor
        self._before = state.velocity
        self._rate = rate
        self._after = state.velocity

    def __call__(self, part: slice, old: Vector, room: Vector | None = None) -> Vector:
        """The new piece there; with `room`, in the place of the old one."""
        before = _NOTHING if self._before is None else OptimizerState(self._before[part])
        new, after = self._optimizer.apply(old, self._gradient[part], before, self._rate, self._divisor, room)
        if after.velocity is not None:
            if self._after is None:
                self._after = np.empty_like(self._gradient)
            self._after[part] = after.velocity
        return new

    @property
    def state(self) -> OptimizerState:
        """After all pieces."""
        return OptimizerState(self._after)


class FloatParameters:
    """A flat vector, changed in place, so that a session need not be told of another one in every step."""

    def __init__(self, received: Vector) -> None:
        self._received = received
        self._vector = received
        self._room = np.empty(min(_BLOCK, len(received)), np.float32)

    @property
    def given(self) -> Parameters:
        """The vector."""
        return self._vector

    def vector(self) -> Vector:
        """The vector."""
        return self._vector

    def descend(
        self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float, divisor: float = 1.0
    ) -> OptimizerState:
        """One step, a piece of the vector at a time."""
        if self._vector is self._received:
            self._vector = self._received.copy()
        step = _Step(optimizer, gradient, state, rate, divisor)
        for first in range(0, len(gradient), _BLOCK):
            part = self._vector[first : first + _BLOCK]
            # Always the same room, which stays in the processor's cache.
            step(slice(first, first + _BLOCK), part, self._room[: len(part)])
        return step.state

    def trained(self) -> Vector:
        """The vector; a copy if nothing has changed it."""
        return self._received.copy() if self._vector is self._received else self._vector


class RoundedParameters:
    """Weights in int8; see `runtimes.int8_parameters`."""

    def __init__(self, entries: tuple[ParameterEntry, ...], received: Vector, rng: np.random.Generator) -> None:
        self._entries = entries
        self._received = received
        self._int8 = Int8Parameters(entries, received)
        self._rng = rng

    @property
    def given(self) -> Parameters:
        """Whole numbers and scales."""
        return self._int8

    def vector(self) -> Vector:
        """All of it widened."""
        return self._int8.vector()

    def descend(
        self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float, divisor: float = 1.0
    ) -> OptimizerState:
        """One step, a piece of the vector at a time, so that it is never widened whole."""
        step = _Step(optimizer, gradient, state, rate, divisor)
        self._int8.update(step, self._rng)
        return step.state

    def trained(self) -> Vector:
        """The received vector and the way from its rounding, so that this rounding is nothing that was learnt."""
        result = self._received.copy()
        began = Int8Parameters(self._entries, self._received)
        for (part, start), (_, end) in zip(began.blocks(), self._int8.blocks(), strict=True):
            result[part] += end - start
        return result

"""The parameters of one local training between its steps: a float32 vector, or weights in int8."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edgetrain.edge_client.optimizers import Optimizer, OptimizerState
from edgetrain.edge_client.runtimes.base import Parameters, Vector
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters
from edgetrain.protocol.manifest import Manifest

# Of the generator that rounds, beside the seed.
_STREAM = 2


class LocalParameters(Protocol):
    """What the loop needs of them."""

    @property
    def given(self) -> Parameters:
        """What a session takes."""
        ...

    def vector(self) -> Vector:
        """As float32 [num_parameters]; not to be changed."""
        ...

    def descend(self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float) -> OptimizerState:
        """One step of the optimizer, which treats every element for itself."""
        ...

    def trained(self, received: Vector) -> Vector:
        """Where the training has led from there, float32 [num_parameters]."""
        ...


def local_parameters(manifest: Manifest, received: Vector, seed: int) -> LocalParameters:
    """Where a local training starts.

    Args:
        manifest: whether the bundle keeps weights in int8.
        received: float32 [num_parameters]; left as it is.
        seed: of the rounding.
    """
    if any(entry.dtype == "int8" for entry in manifest.parameters):
        return RoundedParameters(manifest, received, np.random.Generator(np.random.PCG64([seed, _STREAM])))
    return FloatParameters(received)


class FloatParameters:
    """A flat vector."""

    def __init__(self, received: Vector) -> None:
        self._vector = received

    @property
    def given(self) -> Parameters:
        """The vector."""
        return self._vector

    def vector(self) -> Vector:
        """The vector."""
        return self._vector

    def descend(self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float) -> OptimizerState:
        """One step on the whole vector."""
        self._vector, state = optimizer.apply(self._vector, gradient, state, rate)
        return state

    def trained(self, received: Vector) -> Vector:
        """The vector, wherever it began."""
        return received.copy() if self._vector is received else self._vector


class RoundedParameters:
    """Weights in int8; see `runtimes.int8_parameters`."""

    def __init__(self, manifest: Manifest, received: Vector, rng: np.random.Generator) -> None:
        self._manifest = manifest
        self._int8 = Int8Parameters(manifest.parameters, received)
        self._rng = rng

    @property
    def given(self) -> Parameters:
        """Whole numbers and scales."""
        return self._int8

    def vector(self) -> Vector:
        """All of it widened."""
        return self._int8.vector()

    def descend(self, optimizer: Optimizer, gradient: Vector, state: OptimizerState, rate: float) -> OptimizerState:
        """One step, a piece of the vector at a time, so that it is never widened whole."""
        velocity = state.velocity

        def step(part: slice, old: Vector) -> Vector:
            nonlocal velocity
            before = OptimizerState(None if state.velocity is None else state.velocity[part])
            new, after = optimizer.apply(old, gradient[part], before, rate)
            if after.velocity is not None:
                velocity = np.empty_like(gradient) if velocity is None else velocity
                velocity[part] = after.velocity
            return new

        self._int8.update(step, self._rng)
        return OptimizerState(velocity)

    def trained(self, received: Vector) -> Vector:
        """The received vector and the way from its rounding, so that this rounding is nothing that was learnt."""
        result = received.copy()
        began = Int8Parameters(self._manifest.parameters, received)
        for (part, start), (_, end) in zip(began.blocks(), self._int8.blocks(), strict=True):
            result[part] += end - start
        return result

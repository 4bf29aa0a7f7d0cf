"""What server optimizers share: they take another strategy's step as a gradient.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 1: the change that the inner strategy
would make, negated, is a pseudo-gradient, and any optimizer can take it. So each of them goes around any
strategy, whose own way to average (or to be robust) stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.strategies.base import ServerState, Strategy
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.vectors import Vector

Doubles = npt.NDArray[np.float64]

Apply = Callable[[Doubles, ServerState], tuple[Doubles, dict[str, npt.NDArray[Any]]]]
"""`apply(change, state) -> (what to add to the parameters, new entries of the state)`."""

SERVER_OPTIMIZERS = frozenset({"fedavgm", "fedadam", "fedyogi", "fedadagrad"})


def server_optimizer(name: str, inner: Strategy, apply: Apply) -> Strategy:
    """Wraps `inner`: its change goes through `apply`.

    Raises:
        ConfigError: `inner` has a server optimizer already.
    """
    layers = inner.layers or (inner.name,)
    if found := sorted(SERVER_OPTIMIZERS.intersection(layers)):
        raise ConfigError(
            f"strategy {name!r} around {found[0]!r}: two server optimizers would each take the "
            "other's step for a gradient; keep one"
        )

    def finish(partial: Any, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        after, passed = inner.finish(partial, parameters, state)
        step, entries = apply(after.astype(np.float64) - parameters, state)
        return (parameters + step).astype(np.float32), {**passed, **entries}

    return replace(inner, name=name, finish=finish, layers=(name, *layers))


def adaptive(
    name: str,
    inner: Strategy,
    second_moment: Callable[[Doubles, Doubles], Doubles],
    *,
    learning_rate: float,
    beta1: float,
    tau: float,
) -> Strategy:
    """Algorithm 2 of the paper: `second_moment(v, change)` is what its three optimizers differ in.

    State: m and v as float32 [num_parameters]; v starts at tau^2, the least that the paper allows.
    """

    def apply(change: Doubles, state: ServerState) -> tuple[Doubles, dict[str, npt.NDArray[Any]]]:
        before_m = state.get(f"{name}/m")
        before_v = state.get(f"{name}/v")
        m = beta1 * (0.0 if before_m is None else before_m.astype(np.float64)) + (1 - beta1) * change
        v = second_moment(np.full_like(change, tau**2) if before_v is None else before_v.astype(np.float64), change)
        step = learning_rate * m / (np.sqrt(v) + tau)
        return step, {f"{name}/m": m.astype(np.float32), f"{name}/v": v.astype(np.float32)}

    return server_optimizer(name, inner, apply)

"""Contributions made by hand."""

from __future__ import annotations

import numpy as np

from edgetrain.coordinator.strategies import Contribution, Strategy
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.training import TrainingConfig


def dense(values) -> SparseOrDense:
    values = np.asarray(values, np.float32)
    return SparseOrDense(len(values), None, values)


def contribution(
    client: str,
    values,
    *,
    examples: int = 1,
    steps: int = 1,
    training: TrainingConfig = TrainingConfig(),
    staleness: int = 0,
    control=None,
) -> Contribution:
    update = values if isinstance(values, SparseOrDense) else dense(values)
    return Contribution(
        client,
        examples,
        steps,
        update,
        training=training,
        staleness=staleness,
        control=None if control is None else dense(control),
    )


def run_round(strategy: Strategy, parameters, contributions, state=None):
    """(next parameters, next state)."""
    parameters = np.asarray(parameters, np.float32)
    state = {} if state is None else state
    partial = strategy.init(len(parameters), state)
    for item in contributions:
        partial = strategy.fold(partial, item)
    return strategy.finish(partial, parameters, state)


def run_deltas(strategy: Strategy, rows, **kwargs):
    """The step from 0 for these rows, one client each."""
    rows = np.asarray(rows, np.float32)
    after, _ = run_round(
        strategy,
        np.zeros(rows.shape[1]),
        [contribution(f"c{number:03d}", row, **kwargs) for number, row in enumerate(rows)],
    )
    return after

"""A strategy of your own: averaging in which large clients count more, but not that much more.

FedAvg weighs by number of examples, so a client with 10,000 drowns a hundred with 50; a plain mean lets a
client with 3 examples speak as loud as all others. Here a client weighs n^power: 1 is FedAvg, 0 the plain
mean, 0.5 between them. In federation.toml:

    [strategy]
    name = "examples/own_strategy.py:tempered"
    power = 0.5

or inside a wrapper:

    [strategy]
    name = "fedadam"
    [strategy.inner]
    name = "examples/own_strategy.py:tempered"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.strategies import Contribution, ServerState, Strategy, Vector

# Weights are multiples of this: integers add up to the same sum in every order.
UNIT = 2**20


@dataclass
class Partial:
    """What a round has collected so far."""

    deltas: FixedPointSum
    weight: int = 0


def tempered(*, power: Annotated[float, Meta(ge=0, le=1)] = 0.5) -> Strategy:
    """Mean of the deltas, weighted by num_examples ** power.

    The keyword arguments are the options in federation.toml; their annotations are checked there.
    """

    def init(num_parameters: int, _state: ServerState) -> Partial:
        return Partial(FixedPointSum(num_parameters))

    def fold(partial: Partial, contribution: Contribution) -> Partial:
        weight = round(contribution.num_examples**power * UNIT)
        # Refuses what could overflow, and then changes nothing.
        partial.deltas.add(contribution.update, 1, scale=weight / UNIT)
        partial.weight += weight
        return partial

    def finish(partial: Partial, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        mean = partial.deltas.over(partial.weight / UNIT)
        return (parameters + mean).astype(np.float32), state

    return Strategy("tempered", init, fold, finish)

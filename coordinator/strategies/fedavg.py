"""Federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
algorithm 1: the next parameters are the mean of the clients', weighted by their numbers of examples.
"""

from __future__ import annotations

from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.strategies.base import Contribution, ServerState, Strategy
from edgetrain.protocol.vectors import Vector


def fedavg(*, weighted: bool = True) -> Strategy:
    """Mean of the deltas.

    Args:
        weighted: by number of examples; otherwise every client counts the same.
    """

    def init(num_parameters: int, _state: ServerState) -> FixedPointSum:
        return FixedPointSum(num_parameters)

    def fold(partial: FixedPointSum, contribution: Contribution) -> FixedPointSum:
        partial.add(contribution.update, contribution.num_examples if weighted else 1)
        return partial

    def finish(partial: FixedPointSum, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        return partial.added_to(parameters), state

    return Strategy("fedavg", init, fold, finish)

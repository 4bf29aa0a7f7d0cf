"""What strategies that compare updates with each other share: they need all of them, and a majority."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgetrain.coordinator.strategies.base import Contribution, ServerState, Setting, Strategy
from edgetrain.coordinator.strategies.table import Doubles, UpdateTable
from edgetrain.protocol.vectors import Vector

Aggregate = Callable[[UpdateTable], Doubles]
"""The aggregated delta, [num_parameters]."""


def comparing(
    name: str,
    aggregate: Aggregate,
    *,
    byzantine: float = 0.0,
    needed: Callable[[int], int] = lambda _attackers: 1,
    by_coordinate: bool = False,
) -> Strategy:
    """A strategy that adds `aggregate` of all updates to the parameters.

    Args:
        name: of the strategy.
        aggregate: must not depend on more than the table.
        byzantine: share of the updates that may be malicious.
        needed: fewest updates of a round, from the number of malicious ones among them.
        by_coordinate: it looks at each coordinate by itself, so updates must have a value at every one.
    """

    def init(num_parameters: int, _state: ServerState) -> UpdateTable:
        return UpdateTable(num_parameters)

    def fold(partial: UpdateTable, contribution: Contribution) -> UpdateTable:
        partial.add(contribution)
        return partial

    def finish(partial: UpdateTable, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        if len(partial) == 0:
            return parameters, state
        return (parameters + aggregate(partial)).astype(np.float32), state

    def objection(setting: Setting) -> str | None:
        if setting.only_sums:
            return "it compares single updates, of which only sums are seen under secure aggregation"
        if by_coordinate and setting.codec.select != "dense":
            return (
                f"the codec {str(setting.codec)!r} sends a few coordinates per client, so at nearly all "
                "of them most clients say 0 and so would the result; use a dense codec such as 'dense|int8'"
            )
        for count in range(setting.minimum, setting.goal + 1):
            attackers = count_byzantine(byzantine, count)
            if count < needed(attackers):
                return (
                    f"among {count} updates {attackers} may be malicious (byzantine = {byzantine:g}), for "
                    f"which it needs {needed(attackers)}: raise rounds.goal and rounds.minimum, or "
                    "lower byzantine"
                )
        return None

    return Strategy(name, init, fold, finish, needs_all=True, objection=objection)


def count_byzantine(share: float, count: int) -> int:
    """How many of `count` updates may be malicious: the share, rounded up."""
    return math.ceil(share * count - 1e-9)

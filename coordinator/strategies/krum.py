"""Krum and multi-Krum: the updates that are nearest to most others.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017. Of n
updates, f of them malicious, the score of one is the sum of the squared distances to its n - f - 2 nearest
others; 2f + 2 < n. Krum takes the one with the lowest score, multi-Krum the mean of the m lowest.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.comparing import comparing, count_byzantine
from edgetrain.coordinator.strategies.table import Doubles, UpdateTable, squared_distances

Byzantine = Annotated[float, Meta(ge=0, lt=0.5)]


def krum(*, byzantine: Byzantine = 0.2) -> Strategy:
    """One client's update, whole. Safe, and slow on non-IID data: the others' are lost.

    Args:
        byzantine: share of the clients that may be malicious.
    """

    def aggregate(table: UpdateTable) -> Doubles:
        return _mean_of_lowest(table, byzantine, keep=1)

    return comparing("krum", aggregate, byzantine=byzantine, needed=_needed)


def multi_krum(*, byzantine: Byzantine = 0.2, keep: Annotated[int, Meta(ge=0)] = 0) -> Strategy:
    """The mean of the updates that are nearest to most others.

    Args:
        byzantine: share of the clients that may be malicious.
        keep: m of the paper; 0 for all but as many as may be malicious.
    """

    def aggregate(table: UpdateTable) -> Doubles:
        return _mean_of_lowest(table, byzantine, keep=keep)

    return comparing("multi-krum", aggregate, byzantine=byzantine, needed=_needed)


def krum_scores(distances: Doubles, attackers: int) -> Doubles:
    """The score of every row, [rows], from the squared distances between them [rows, rows]."""
    count = len(distances)
    neighbours = max(1, count - attackers - 2)
    # Column 0 of a sorted row is its distance to itself.
    scores: Doubles = np.sort(distances, axis=1)[:, 1 : 1 + neighbours].sum(axis=1)
    return scores


def _mean_of_lowest(table: UpdateTable, byzantine: float, keep: int) -> Doubles:
    attackers = count_byzantine(byzantine, len(table))
    scores = krum_scores(squared_distances(table.gram()), attackers)
    chosen: npt.NDArray[np.int64] = np.argsort(scores, kind="stable")[: keep or max(1, len(table) - attackers)]
    weights = np.zeros(len(table))
    weights[chosen] = 1 / len(chosen)
    return table.combine(weights)


def _needed(attackers: int) -> int:
    return 2 * attackers + 3

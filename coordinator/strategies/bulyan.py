"""Bulyan: Krum chooses, then a trimmed mean around the median of every coordinate.

El Mhamdi et al., "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018. Of n >= 4f + 3
updates, Krum picks one after the other until n - 2f are chosen; every coordinate of the result is the mean of
the n - 4f chosen values that are nearest to their median. It answers attacks that hide a large change in a
few coordinates, where distances of whole vectors do not see it.
"""

from __future__ import annotations

import numpy as np

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.comparing import comparing, count_byzantine
from edgetrain.coordinator.strategies.krum import Byzantine, krum_scores
from edgetrain.coordinator.strategies.table import Doubles, UpdateTable, squared_distances


def bulyan(*, byzantine: Byzantine = 0.2) -> Strategy:
    """Bulyan around Krum.

    Args:
        byzantine: share of the clients that may be malicious; with 0.2 it needs 15 clients.
    """

    def aggregate(table: UpdateTable) -> Doubles:
        attackers = min(count_byzantine(byzantine, len(table)), (len(table) - 1) // 4)
        distances = squared_distances(table.gram())
        left: list[int] = list(range(len(table)))
        chosen: list[int] = []
        while len(chosen) < len(table) - 2 * attackers:
            scores = krum_scores(distances[np.ix_(left, left)], attackers)
            chosen.append(left.pop(int(np.argmin(scores))))
        rows, keep = np.sort(chosen), len(table) - 4 * attackers
        result = np.empty(table.num_parameters)
        for coordinates, block in table.blocks():
            values = block[rows]
            order = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0, kind="stable")
            result[coordinates] = np.take_along_axis(values, order[:keep], axis=0).mean(axis=0)
        return result

    return comparing(
        "bulyan",
        aggregate,
        byzantine=byzantine,
        needed=lambda attackers: 4 * attackers + 3,
        by_coordinate=True,
    )

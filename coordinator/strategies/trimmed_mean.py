"""Coordinate-wise trimmed mean.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
algorithm 1, option II. Every client counts the same.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.comparing import comparing, count_byzantine
from edgetrain.coordinator.strategies.table import Doubles, UpdateTable


def trimmed_mean(*, byzantine: Annotated[float, Meta(ge=0, lt=0.5)] = 0.2) -> Strategy:
    """The mean of every coordinate without its smallest and largest values.

    Args:
        byzantine: share of the clients that may be malicious: so many values go at either end, rounded up.
    """

    def aggregate(table: UpdateTable) -> Doubles:
        cut = min(count_byzantine(byzantine, len(table)), (len(table) - 1) // 2)
        result = np.empty(table.num_parameters)
        for coordinates, block in table.blocks():
            block.sort(axis=0)
            result[coordinates] = block[cut : len(table) - cut].mean(axis=0)
        return result

    return comparing(
        "trimmed-mean",
        aggregate,
        byzantine=byzantine,
        needed=lambda attackers: 2 * attackers + 1,
        by_coordinate=True,
    )

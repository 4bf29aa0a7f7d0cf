"""Coordinate-wise median.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
algorithm 1, option I. Every client counts the same. Fewer than half of the clients may be malicious; on
non-IID data the median of a coordinate is biased where its distribution is skewed.
"""

from __future__ import annotations

import numpy as np

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.comparing import comparing
from edgetrain.coordinator.strategies.table import Doubles, UpdateTable


def median() -> Strategy:
    """The median of every coordinate; the mean of the middle two for an even number."""

    def aggregate(table: UpdateTable) -> Doubles:
        result = np.empty(table.num_parameters)
        for coordinates, block in table.blocks():
            result[coordinates] = np.median(block, axis=0)
        return result

    return comparing("median", aggregate, by_coordinate=True)

"""Geometric median: the point with the least sum of distances to all updates.

Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022 (RFA), algorithm 2:
smoothed Weiszfeld. The iterate is always a weighted mean of the updates, so all distances follow from their
dot products: one pass over the updates, then the iterations cost nothing, then one pass for the result.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.comparing import comparing
from edgetrain.coordinator.strategies.table import Doubles, UpdateTable


def geometric_median(
    *,
    iterations: Annotated[int, Meta(ge=1)] = 100,
    smoothing: Annotated[float, Meta(gt=0)] = 1e-6,
    weighted: bool = False,
) -> Strategy:
    """Geometric median of the updates.

    Args:
        iterations: of Weiszfeld, at most; it stops when the weights stand still.
        smoothing: nu of the paper: distances below it count as it, so that no update's weight is infinite.
        weighted: by number of examples, as in the paper; then clients that claim many weigh much.
    """

    def aggregate(table: UpdateTable) -> Doubles:
        alpha = table.num_examples if weighted else np.ones(len(table))
        return table.combine(weiszfeld(table.gram(), alpha / alpha.sum(), iterations, smoothing))

    return comparing("geometric-median", aggregate)


def weiszfeld(gram: Doubles, alpha: Doubles, iterations: int, smoothing: float) -> Doubles:
    """The weights [rows] of the geometric median as a mean of the rows.

    Args:
        gram: dot products of the rows, [rows, rows].
        alpha: their own weights, of sum 1.
        iterations: at most.
        smoothing: nu.
    """
    weights = alpha
    for _ in range(iterations):
        products = gram @ weights
        squared = np.diag(gram) - 2 * products + weights @ products
        beta = alpha / np.maximum(smoothing, np.sqrt(np.maximum(squared, 0.0)))
        before, weights = weights, beta / beta.sum()
        if np.max(np.abs(weights - before)) < 1e-12:
            break
    return weights

"""Counting subsets."""

from __future__ import annotations

import math


def log_binomial(n: int, k: int) -> float:
    """Logarithm of the number of subsets of `k` out of `n`; minus infinity where there are none."""
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

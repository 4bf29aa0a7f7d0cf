"""How long a round may take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgetrain.coordinator.config import RoundsConfig

# Fewer durations say too little.
MIN_OBSERVED = 4


def deadline_seconds(config: RoundsConfig, durations: Sequence[float], attempt: int) -> float:
    """Seconds from the invitation to the deadline.

    Adaptive: a quantile of what clients took, times a margin; at most `rounds.deadline_seconds`, which
    also holds while little has been observed and for retries of a failed round, where the guess was too low.

    Args:
        config: [rounds].
        durations: seconds from invitation to arrival, of earlier updates.
        attempt: of the round, from 1.
    """
    if not config.adaptive_deadline or attempt > 1 or len(durations) < MIN_OBSERVED:
        return config.deadline_seconds
    guess = float(np.quantile(np.asarray(durations), config.deadline_quantile)) * config.deadline_margin
    return min(config.deadline_seconds, max(config.min_deadline_seconds, guess))

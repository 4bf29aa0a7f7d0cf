"""When to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetrain.coordinator.config import StopConfig


def stop_reason(config: StopConfig, history: Sequence[tuple[float | None, float | None]]) -> str | None:
    """Why the run is over, or None.

    Args:
        config: [stop].
        history: (loss, accuracy) after each round, from the first; None where not evaluated.
    """
    if history and config.target_accuracy > 0:
        accuracy = history[-1][1]
        if accuracy is not None and accuracy >= config.target_accuracy:
            return f"accuracy {accuracy:.4f} reached the target of {config.target_accuracy:g}"
    if config.patience > 0:
        sign, column = (1.0, 0) if config.metric == "loss" else (-1.0, 1)
        values = [
            sign * value for row in history if (value := row[column]) is not None and math.isfinite(value)
        ]
        if len(values) > config.patience:
            before, recent = min(values[: -config.patience]), min(values[-config.patience :])
            if recent > before - config.min_improvement:
                return (
                    f"converged: {config.metric} has not improved by {config.min_improvement:g} "
                    f"over {config.patience} rounds"
                )
    return None

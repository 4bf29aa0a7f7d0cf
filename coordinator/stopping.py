"""When to stop, and which round was the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.config import StopConfig
from edgetrain.coordinator.run.records import RoundRecord

# Of a metric by the clients: "clients.accuracy" is the mean over them, weighted by examples.
BY_CLIENTS = "clients."


def stop_reason(
    config: StopConfig,
    history: Sequence[tuple[float | None, float | None]],
    series: Sequence[float | None] | None = None,
) -> str | None:
    """Why the run is over, or None.

    Args:
        config: [stop].
        history: (loss, accuracy) after each round, from the first; None where not evaluated.
        series: `config.metric` after each round; if left out, that column of the history.
    """
    if history and config.target_accuracy > 0:
        accuracy = history[-1][1]
        if accuracy is not None and accuracy >= config.target_accuracy:
            return f"accuracy {accuracy:.4f} reached the target of {config.target_accuracy:g}"
    if config.patience > 0:
        if series is None:
            series = [row[1 if config.metric == "accuracy" else 0] for row in history]
        sign = 1.0 if smaller_is_better(config.metric) else -1.0
        values = [sign * value for value in series if value is not None and math.isfinite(value)]
        if len(values) > config.patience:
            before, recent = min(values[: -config.patience]), min(values[-config.patience :])
            if recent > before - config.min_improvement:
                return (
                    f"converged: {config.metric} has not improved by {config.min_improvement:g} "
                    f"over {config.patience} rounds"
                )
    return None


def metric_series(
    metric: str, records: Sequence[RoundRecord], evaluations: Sequence[FederatedEvaluation]
) -> list[float | None]:
    """A metric after each round; None where it was not measured.

    Args:
        metric: a number in `RoundRecord` ("loss", "accuracy", "train_loss"), or "clients." and what clients
            report ("clients.accuracy").
        records: of the closed rounds.
        evaluations: by the clients.
    """
    if metric.startswith(BY_CLIENTS):
        name = metric.removeprefix(BY_CLIENTS)
        means = {
            evaluation.round: evaluation.spread[name].mean for evaluation in evaluations if name in evaluation.spread
        }
        return [means.get(record.round) for record in records]
    return [getattr(record, metric) for record in records]


def smaller_is_better(metric: str) -> bool:
    """Whether a metric of that name is a cost."""
    return any(word in metric for word in ("loss", "error", "perplexity"))


def best_round(metric: str, records: Sequence[RoundRecord], series: Sequence[float | None]) -> int | None:
    """The round with the best value of a metric, the earlier of equals; None if it was never measured."""
    sign = 1.0 if smaller_is_better(metric) else -1.0
    measured = [
        (sign * value, record.round) for record, value in zip(records, series, strict=True) if value is not None
    ]
    return min(measured)[1] if measured else None

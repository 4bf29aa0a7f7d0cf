"""How a metric is spread over the clients: is the model fair, and who got worse?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from edgetrain.protocol.messages import Report


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A metric over the clients."""

    # Weighted by examples: what one big data set would give.
    mean: float
    minimum: float
    p10: float
    median: float
    maximum: float
    # Between clients, unweighted.
    deviation: float
    # Jain's index: 1 if all clients have the same, 1/n if one has everything.
    fairness: float


class ClientMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What one client measured on its own validation data."""

    client: str
    num_examples: int
    metrics: dict[str, float]


class FederatedEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """A line of evaluations.jsonl: the parameters after a round, by the clients."""

    round: int
    clients: tuple[ClientMetrics, ...]
    spread: dict[str, Spread]
    # Clients that are worse off than when they were asked last, by accuracy or else by loss.
    worse: tuple[str, ...] = ()


def evaluation_of(
    number: int, reports: Mapping[str, Report], before: FederatedEvaluation | None
) -> FederatedEvaluation:
    """What the clients' reports on the parameters after round `number` come to.

    Args:
        number: of the round.
        reports: by client.
        before: the evaluation before this one.
    """
    clients = tuple(
        ClientMetrics(client=name, num_examples=report.num_examples, metrics=report.metrics)
        for name, report in sorted(reports.items())
    )
    names = sorted({metric for client in clients for metric in client.metrics})
    spread = {}
    for metric in names:
        measured = [client for client in clients if metric in client.metrics]
        spread[metric] = spread_of(
            [client.metrics[metric] for client in measured], [client.num_examples for client in measured]
        )
    earlier = {client.client: client.metrics for client in before.clients} if before else {}
    worse = tuple(client.client for client in clients if _is_worse(earlier.get(client.client), client.metrics))
    return FederatedEvaluation(round=number, clients=clients, spread=spread, worse=worse)


def spread_of(values: Sequence[float], weights: Sequence[float]) -> Spread:
    """The spread of values; the mean is weighted (plain if all weights are 0)."""
    array = np.asarray(values, np.float64)
    by = np.asarray(weights, np.float64)
    squares = float((array**2).sum())
    return Spread(
        mean=float(np.average(array, weights=by if by.sum() > 0 else None)),
        minimum=float(array.min()),
        p10=float(np.quantile(array, 0.1)),
        median=float(np.median(array)),
        maximum=float(array.max()),
        deviation=float(array.std()),
        fairness=float(array.sum() ** 2 / (len(array) * squares)) if squares else 1.0,
    )


def _is_worse(before: Mapping[str, float] | None, now: Mapping[str, float]) -> bool:
    if before is None:
        return False
    if "accuracy" in before and "accuracy" in now:
        return now["accuracy"] < before["accuracy"]
    return "loss" in before and "loss" in now and now["loss"] > before["loss"]

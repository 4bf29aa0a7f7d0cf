"""FedAdagrad: Adagrad at the server.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2:

    m = beta1 m + (1 - beta1) change
    v = v + change^2
    parameters += learning_rate * m / (sqrt(v) + tau)
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.coordinator.strategies.server_optimizer import Doubles, adaptive


def fedadagrad(
    *,
    inner: Strategy | None = None,
    learning_rate: Annotated[float, Meta(gt=0)] = 0.01,
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.0,
    tau: Annotated[float, Meta(gt=0)] = 1e-3,
) -> Strategy:
    """Adagrad around another strategy.

    Args:
        inner: what averages; FedAvg if left out.
        learning_rate: the server's.
        beta1: of the mean of the changes; the paper's experiments use 0 here.
        tau: adaptivity.
    """

    def second_moment(v: Doubles, change: Doubles) -> Doubles:
        return v + change**2

    return adaptive("fedadagrad", inner or fedavg(), second_moment, learning_rate=learning_rate, beta1=beta1, tau=tau)

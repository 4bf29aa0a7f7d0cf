"""FedYogi: Yogi at the server.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2:

    m = beta1 m + (1 - beta1) change
    v = v - (1 - beta2) change^2 sign(v - change^2)
    parameters += learning_rate * m / (sqrt(v) + tau)
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from msgspec import Meta

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.coordinator.strategies.server_optimizer import Doubles, adaptive


def fedyogi(
    *,
    inner: Strategy | None = None,
    learning_rate: Annotated[float, Meta(gt=0)] = 0.01,
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9,
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.99,
    tau: Annotated[float, Meta(gt=0)] = 1e-3,
) -> Strategy:
    """Yogi around another strategy.

    Args:
        inner: what averages; FedAvg if left out.
        learning_rate: the server's: about how far an element moves in a round.
        beta1: of the mean of the changes.
        beta2: of the mean of their squares.
        tau: adaptivity; changes far below it move in proportion to themselves.
    """

    def second_moment(v: Doubles, change: Doubles) -> Doubles:
        return v - (1 - beta2) * change**2 * np.sign(v - change**2)

    return adaptive("fedyogi", inner or fedavg(), second_moment, learning_rate=learning_rate, beta1=beta1, tau=tau)

"""FedProx: a term that holds clients near the parameters they were given.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, algorithm 2: a client minimizes its
own loss + mu / 2 * |w - w_received|^2. The paper draws clients with a probability proportional to their
examples and then takes the plain mean; here they are drawn otherwise and the mean is weighted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.protocol.training import TrainingConfig


def fedprox(*, mu: Annotated[float, Meta(gt=0)] = 0.01) -> Strategy:
    """FedAvg whose clients have the proximal term.

    Args:
        mu: weight of the term; the paper tries 0.001 to 1.
    """

    def training(config: TrainingConfig) -> TrainingConfig:
        return msgspec.structs.replace(config, proximal_mu=mu)

    return replace(fedavg(), name="fedprox", training=training)

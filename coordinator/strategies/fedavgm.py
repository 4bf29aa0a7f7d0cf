"""FedAvgM: momentum at the server.

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, section 4.3:  v = beta v + change;  parameters += learning_rate * v.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgetrain.coordinator.strategies.base import ServerState, Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.coordinator.strategies.server_optimizer import Doubles, server_optimizer

_V = "fedavgm/v"


def fedavgm(
    *,
    inner: Strategy | None = None,
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9,
    learning_rate: Annotated[float, Meta(gt=0)] = 1.0,
) -> Strategy:
    """Server momentum around another strategy.

    Args:
        inner: what averages; FedAvg if left out.
        momentum: beta.
        learning_rate: the server's. With momentum beta, steps add up to 1 / (1 - beta) times as much.
    """

    def apply(change: Doubles, state: ServerState) -> tuple[Doubles, dict[str, npt.NDArray[Any]]]:
        before = state.get(_V)
        v = change if before is None else momentum * before.astype(np.float64) + change
        return learning_rate * v, {_V: v.astype(np.float32)}

    return server_optimizer("fedavgm", inner or fedavg(), apply)

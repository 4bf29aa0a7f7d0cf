"""Federated SGD: every client sends the gradient of all its data, the server takes one step.

McMahan et al., AISTATS 2017, section 2: FedAvg with one epoch and the whole local data as one batch. A delta
is then `-learning_rate * gradient`, so the mean of the deltas is the server's step.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from edgetrain.coordinator.strategies.base import Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.protocol.training import TrainingConfig

# Larger than any local data set, and a 32-bit number for clients in other languages.
WHOLE_DATA = 2**31 - 1


def fedsgd() -> Strategy:
    """One full-batch gradient step per round; `training.learning_rate` is the server's."""

    def training(config: TrainingConfig) -> TrainingConfig:
        return msgspec.structs.replace(
            config, epochs=1, max_steps=1, batch_size=WHOLE_DATA, momentum=0.0, nesterov=False
        )

    return replace(fedavg(), name="fedsgd", training=training)

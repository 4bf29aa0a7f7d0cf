"""Strategies, one file each, by name."""

from edgetrain.coordinator.strategies.base import (
    Contribution,
    Mergeable,
    Private,
    ServerState,
    Setting,
    Strategy,
    described,
)
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.coordinator.strategies.make import STRATEGIES, StrategyTable, check_strategy, make_strategy
from edgetrain.protocol.vectors import Vector

__all__ = [
    "STRATEGIES",
    "Contribution",
    "Mergeable",
    "Private",
    "ServerState",
    "Setting",
    "Strategy",
    "StrategyTable",
    "Vector",
    "check_strategy",
    "described",
    "fedavg",
    "make_strategy",
]

"""Strategies, one file each, by name."""

from edgetrain.coordinator.strategies.base import (
    Contribution,
    ServerState,
    Setting,
    Strategy,
    Vector,
    described,
)
from edgetrain.coordinator.strategies.make import STRATEGIES, StrategyTable, make_strategy

__all__ = [
    "STRATEGIES",
    "Contribution",
    "ServerState",
    "Setting",
    "Strategy",
    "StrategyTable",
    "Vector",
    "described",
    "make_strategy",
]

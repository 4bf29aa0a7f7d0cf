"""Strategies, one file each, by name."""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.coordinator.strategies.base import Contribution, ServerState, Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.protocol.errors import ConfigError

STRATEGIES: dict[str, Callable[[], Strategy]] = {"fedavg": fedavg}


def make_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy {name!r} is not known; there is: {', '.join(sorted(STRATEGIES))}")
    return STRATEGIES[name]()


__all__ = ["STRATEGIES", "Contribution", "ServerState", "Strategy", "fedavg", "make_strategy"]

"""Who runs the workers: local processes, or Ray."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.workers.messages import Command, Died, Reports
from edgetrain.protocol.errors import ConfigError

Deliver = Callable[[Reports | Died], None]

# What is needed for one of them is imported when it is asked for.
CREWS = {
    "processes": "edgetrain.coordinator.workers.process_crew:ProcessCrew",
    "ray": "edgetrain.coordinator.workers.ray_crew:RayCrew",
}


class Crew(Protocol):
    """Starts workers and carries what they and the coordinator say. What they say is delivered from other threads."""

    def start(self, worker: int, life: int) -> None:
        """Starts a worker; it says `Started`, or it dies."""
        ...

    def send(self, worker: int, commands: Sequence[Command]) -> None:
        """Says something to a worker, in order. One that is gone does not hear it."""
        ...

    def kill(self, worker: int) -> None:
        """Ends a worker that hangs; it dies like any other."""
        ...

    def close(self) -> None:
        """Ends all workers."""
        ...


def parse_workers(text: str) -> tuple[str, int]:
    """(kind, number) of a setting such as "ray:4".

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d{0,3})", text)
    if not found or found[1] not in CREWS:
        raise ConfigError(f"workers: {text!r} is not usable; write processes:N or ray:N, or leave it out")
    return found[1], int(found[2])


def make_crew(kind: str, config: FederationConfig, run: bytes, deliver: Deliver) -> Crew:
    """The crew of a kind.

    Raises:
        ConfigError: what it needs is not installed.
    """
    module, _, name = CREWS[kind].partition(":")
    make: Callable[[FederationConfig, bytes, Deliver], Crew] = getattr(importlib.import_module(module), name)
    return make(config, run, deliver)

"""Every event as a line of JSON: the run's structured log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgetrain.coordinator import events


class EventLog:
    """An observer that appends to a file: {"time": …, "event": "RoundEnded", …}.

    Args:
        path: of the file.
        clock: wall time in seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock

    def __call__(self, event: events.Event) -> None:
        """Takes one event."""
        line = {"time": round(self._clock(), 3), "event": type(event).__name__}
        line |= msgspec.to_builtins(event)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")

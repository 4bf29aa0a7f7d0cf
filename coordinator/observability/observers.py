"""The observers that the settings ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgetrain.coordinator.errors import CoordinatorError
from edgetrain.coordinator.events import Event, Observer
from edgetrain.coordinator.observability.config import ObservabilityConfig
from edgetrain.coordinator.observability.event_log import EventLog
from edgetrain.coordinator.observability.prometheus import Counters, PrometheusServer
from edgetrain.coordinator.observability.tensorboard import TensorBoardWriter


@contextlib.contextmanager
def observers(config: ObservabilityConfig, *, federation: str, directory: Path, also: Observer) -> Iterator[Observer]:
    """One observer that tells all of them.

    Args:
        config: [observability].
        federation: its name.
        directory: of the run.
        also: another one, told first.

    Raises:
        CoordinatorError: the Prometheus port is taken, or a file cannot be written.
    """
    told: list[Observer] = [also]
    with contextlib.ExitStack() as stack:
        try:
            if config.events:
                told.append(EventLog(directory / "events.jsonl"))
            if config.tensorboard:
                told.append(TensorBoardWriter(directory / "tensorboard"))
        except OSError as error:
            raise CoordinatorError(f"{directory}: cannot write: {error}") from error
        if config.prometheus_port:
            counters = Counters(federation)
            host, port = config.prometheus_host, config.prometheus_port
            stack.enter_context(PrometheusServer(counters, host=host, port=port))
            told.append(counters)
        yield _all_of(told)


def _all_of(told: Sequence[Observer]) -> Observer:
    def observe(event: Event) -> None:
        for observer in told:
            observer(event)

    return observe

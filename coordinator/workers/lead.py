"""Workers as the settings ask for them."""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.strategies import Mergeable, Strategy, described
from edgetrain.coordinator.workers.crew import make_crew, parse_workers
from edgetrain.coordinator.workers.foreman import Foreman
from edgetrain.coordinator.workers.listener import Listener
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.transport import Noticed, Transport


def lead_workers(
    config: FederationConfig,
    *,
    strategy: Strategy,
    directory: RunDirectory,
    transport: Transport,
    listener: Listener,
    max_update_bytes: int,
    clock: Callable[[], float],
) -> Foreman | None:
    """Whoever will start and lead the workers; None if the settings have none.

    Args:
        config: the settings.
        strategy: of the federation.
        directory: of the run; workers write their segments of the journal there.
        transport: the coordinator's; what workers say comes with its events.
        listener: hears what becomes of updates.
        max_update_bytes: of one update.
        clock: monotonic seconds.

    Raises:
        ConfigError: workers cannot do what the settings ask for.
    """
    if not config.workers:
        return None
    check_workers(config, strategy)
    kind, count = parse_workers(config.workers)
    return Foreman(
        lambda: make_crew(kind, config, directory.run, lambda said: transport.deliver(Noticed(said))),
        count,
        listener=listener,
        journal=directory.journal_path,
        max_update_bytes=max_update_bytes,
        clock=clock,
    )


def check_workers(config: FederationConfig, strategy: Strategy) -> None:
    """Returns if there are no workers, or they can do what the settings ask for.

    Raises:
        ConfigError: they cannot.
    """
    if not config.workers:
        return
    parse_workers(config.workers)
    if config.secure_aggregation.enabled:
        raise ConfigError("workers: with secure aggregation there is one sum, which the coordinator makes; use none")
    if strategy.asynchronous:
        raise ConfigError(f"workers: {described(strategy)!r} is asynchronous, which is not done with workers; use none")
    if not isinstance(strategy.init(1, {}), Mergeable):
        raise ConfigError(f"workers: {described(strategy)!r} needs all updates at one place; use no workers")

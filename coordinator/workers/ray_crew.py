"""Workers as Ray actors, on this machine or on others (`pip install 'edgetrain[ray]'`).

`RAY_ADDRESS` names the cluster to use; without it, Ray is started here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.workers.crew import Deliver
from edgetrain.coordinator.workers.loop import WorkerSetting, connect, work
from edgetrain.coordinator.workers.messages import Command, Died, Failed, Report, Reports, Stop
from edgetrain.protocol.errors import ConfigError, EdgetrainError
from edgetrain.protocol.transport import Noticed

# A worker that has nothing to say answers after so long, so that the question is not open for ever.
_PATIENCE_SECONDS = 10.0
_STOP_SECONDS = 5.0


class RayWorker:
    """The actor: a worker in a thread, spoken to by `say` and listened to by `hear`.

    Args:
        setting: which worker this is.
    """

    def __init__(self, setting: WorkerSetting) -> None:
        self._reports: queue.SimpleQueue[Sequence[Report]] = queue.SimpleQueue()
        self._setting = setting
        try:
            self._transport = connect(setting)
        except EdgetrainError as error:
            self._reports.put([Failed(str(error))])
            return
        threading.Thread(target=self._work, daemon=True).start()

    def say(self, commands: Sequence[Command]) -> None:
        """Commands of the coordinator."""
        for command in commands:
            self._transport.deliver(Noticed(command))

    def hear(self) -> list[Report]:
        """What the worker has to say; nothing, if it has nothing for a while."""
        found: list[Report] = []
        with contextlib.suppress(queue.Empty):
            found += self._reports.get(timeout=_PATIENCE_SECONDS)
            while True:
                found += self._reports.get_nowait()
        return found

    def _work(self) -> None:
        try:
            work(self._setting, self._transport, self._reports.put)
        except Exception as error:
            logging.getLogger(__name__).exception("worker %d", self._setting.number)
            self._reports.put([Failed(f"worker {self._setting.number}: {type(error).__name__}: {error}")])
        finally:
            self._transport.close()


class RayCrew:
    """An actor per worker, each on a CPU of its own.

    Args:
        config: of the federation.
        run: its id.
        deliver: gets what they say.

    Raises:
        ConfigError: Ray is not installed, or does not start.
    """

    def __init__(self, config: FederationConfig, run: bytes, deliver: Deliver) -> None:
        try:
            import ray  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError("workers: Ray is not installed: pip install 'edgetrain[ray]'") from error
        self._ray: Any = ray
        self._config = config
        self._run = run
        self._deliver = deliver
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            # A federation tells nobody else that it exists.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                raise ConfigError(f"workers: Ray does not start: {error}") from error
        groups = {"say": 1, "hear": 1}
        self._kind = ray.remote(num_cpus=1, max_restarts=0, concurrency_groups=groups)(RayWorker)
        self.actors: dict[int, Any] = {}
        self._listeners: list[threading.Thread] = []
        self._closing = False

    def start(self, worker: int, life: int) -> None:
        """See `Crew`."""
        actor = self.actors[worker] = self._kind.remote(WorkerSetting(self._config, self._run, worker, life))
        listener = threading.Thread(target=self._listen, args=(worker, life, actor), daemon=True)
        self._listeners.append(listener)
        listener.start()

    def send(self, worker: int, commands: Sequence[Command]) -> None:
        """See `Crew`."""
        self.actors[worker].say.options(concurrency_group="say").remote(list(commands))

    def kill(self, worker: int) -> None:
        """See `Crew`."""
        self._ray.kill(self.actors[worker])

    def close(self) -> None:
        """See `Crew`."""
        self._closing = True
        for worker in self.actors:
            self.send(worker, [Stop()])
        for actor in self.actors.values():
            self._ray.kill(actor)
        for listener in self._listeners:
            listener.join(_STOP_SECONDS)
        self.actors.clear()
        if self._started_ray:
            self._ray.shutdown()

    def _listen(self, worker: int, life: int, actor: Any) -> None:
        try:
            while not self._closing:
                reports = self._ray.get(actor.hear.options(concurrency_group="hear").remote())
                if reports:
                    self._deliver(Reports(worker, life, tuple(reports)))
        except self._ray.exceptions.RayError as error:
            # Unreachable is not dead: nobody else may write to its segment while it does.
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
            self._deliver(Died(worker, life, str(error).splitlines()[0]))

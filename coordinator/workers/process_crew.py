"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.workers.crew import Deliver
from edgetrain.coordinator.workers.loop import WorkerSetting, connect, work
from edgetrain.coordinator.workers.messages import Command, Died, Failed, Reports, Stop
from edgetrain.protocol.errors import EdgetrainError
from edgetrain.protocol.transport import Noticed, Transport

_STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Member:
    process: SpawnProcess
    pipe: Connection
    listener: threading.Thread


class ProcessCrew:
    """A process per worker, and a pipe to each.

    Args:
        config: of the federation.
        run: its id.
        deliver: gets what they say.
    """

    def __init__(self, config: FederationConfig, run: bytes, deliver: Deliver) -> None:
        self._config = config
        self._run = run
        self._deliver = deliver
        self._members: dict[int, _Member] = {}

    def start(self, worker: int, life: int) -> None:
        """See `Crew`."""
        if before := self._members.pop(worker, None):
            before.listener.join()
            before.process.close()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        setting = WorkerSetting(self._config, self._run, worker, life)
        process = context.Process(target=_main, args=(setting, theirs), name=f"edgetrain-worker-{worker}", daemon=True)
        process.start()
        theirs.close()
        listener = threading.Thread(target=self._listen, args=(worker, life, process, ours), daemon=True)
        self._members[worker] = _Member(process, ours, listener)
        listener.start()

    def send(self, worker: int, commands: Sequence[Command]) -> None:
        """See `Crew`."""
        # Its end is noticed by whoever listens to it.
        with contextlib.suppress(OSError):
            self._members[worker].pipe.send(commands)

    def kill(self, worker: int) -> None:
        """See `Crew`."""
        self._members[worker].process.kill()

    def close(self) -> None:
        """See `Crew`."""
        for worker in self._members:
            self.send(worker, [Stop()])
        for member in self._members.values():
            # It waits for the process, too.
            member.listener.join(_STOP_SECONDS)
            member.process.kill()
            member.listener.join()
            member.process.close()
        self._members.clear()

    @property
    def pids(self) -> dict[int, int | None]:
        """The workers' process ids."""
        return {worker: member.process.pid for worker, member in self._members.items()}

    def _listen(self, worker: int, life: int, process: SpawnProcess, pipe: Connection) -> None:
        with pipe:
            try:
                while True:
                    self._deliver(Reports(worker, life, tuple(pipe.recv())))
            except (EOFError, OSError):
                # Whatever has become of it, it writes nothing any more from here on.
                process.kill()
                process.join()
        self._deliver(Died(worker, life, f"exit status {process.exitcode}"))


def _main(setting: WorkerSetting, pipe: Connection) -> None:
    # Ctrl-C is for the coordinator, who then says what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        transport = connect(setting)
    except EdgetrainError as error:
        pipe.send([Failed(str(error))])
        return
    threading.Thread(target=_hear, args=(pipe, transport), daemon=True).start()
    try:
        # A coordinator that is gone needs no reports.
        with contextlib.suppress(OSError):
            work(setting, transport, pipe.send)
    finally:
        transport.close()


def _hear(pipe: Connection, transport: Transport) -> None:
    try:
        while True:
            for command in pipe.recv():
                transport.deliver(Noticed(command))
    except (EOFError, OSError):
        # The coordinator is gone.
        transport.deliver(Noticed(Stop()))

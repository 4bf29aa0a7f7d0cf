"""Workers in the thread of the test: real ones, over the broker in memory, that can be killed at any point."""

from __future__ import annotations

import random
from typing import Any

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.workers import crew as crews
from edgetrain.coordinator.workers.messages import Died, Reports, Stop, Taken
from edgetrain.coordinator.workers.worker import Worker
from edgetrain.protocol.names import Topics
from edgetrain.protocol.transport import MemoryBroker, Noticed, Received
from support.scripted import ScriptedFederation


class InlineWorker:
    def __init__(self, broker: MemoryBroker, config: FederationConfig, run: bytes) -> None:
        self.broker = broker
        self.transport = broker.connect()
        self.transport.subscribe(Topics.shared(f"edgetrain-{run.hex()[:8]}", Topics("f").from_client("+", "blob")))
        self.reports: list[Any] = []
        self.worker = Worker(config, self.reports.extend)

    def work(self, most: int) -> None:
        """Handles a few events, without the sync and the reports that follow."""
        for _ in range(most):
            event = self.transport.receive(0)
            match event:
                case None:
                    return
                case Received():
                    self.worker.on_message(event)
                case Noticed(notice=Stop()):
                    return
                case Noticed():
                    self.worker.on_command(event.notice)

    def die(self) -> None:
        self.broker.drop(self.transport)
        self.worker.close()


class InlineCrew:
    """A `Crew`. `step` lets every worker act once; with `chance`, some die before, in the middle or afterwards."""

    broker: MemoryBroker
    chance: random.Random | None = None
    # A share of the steps.
    mortality = 0.0
    last: InlineCrew

    def __init__(self, config: FederationConfig, run: bytes, deliver: Any) -> None:
        self.config, self.run, self.deliver = config, run, deliver
        self.workers: dict[int, InlineWorker] = {}
        self.lives: dict[int, int] = {}
        self.killed = 0
        # Those that do nothing any more.
        self.hanging: set[int] = set()
        self.taken: list[tuple[int, str]] = []
        InlineCrew.last = self

    def start(self, worker, life):
        self.workers[worker] = InlineWorker(self.broker, self.config, self.run)
        self.hanging.discard(worker)
        self.lives[worker] = life

    def send(self, worker, commands):
        for command in commands:
            self.workers[worker].transport.deliver(Noticed(command))

    def close(self):
        for worker in self.workers.values():
            worker.die()
        self.workers.clear()

    def kill(self, number, *, torn=0):
        """kill -9; so many bytes that were written are not on the disk."""
        worker = self.workers[number]
        collection = worker.worker._collection
        worker.die()
        if torn and collection:
            path = collection._journal.path
            path.write_bytes(path.read_bytes()[:-torn])
        self.killed += 1
        self.deliver(Died(number, self.lives[number], "killed by the test"))

    def step(self):
        for number, worker in list(self.workers.items()):
            if number in self.hanging:
                continue
            dies = self.chance and self.chance.random() < self.mortality
            worker.work(self.chance.randrange(0, 4) if dies else 1000)
            if dies:
                unsynced = bool(worker.worker._receipts)
                self.kill(number, torn=self.chance.choice([0, 1, 30]) if unsynced else 0)
                continue
            worker.worker.flush()
            if worker.reports:
                reports, worker.reports[:] = tuple(worker.reports), []
                self.taken += [(number, report.client) for report in reports if isinstance(report, Taken)]
                self.deliver(Reports(number, self.lives[number], reports))


crews.CREWS["inline"] = "support.inline_crew:InlineCrew"


class SpreadFederation(ScriptedFederation):
    """Whose updates are taken by inline workers."""

    def __init__(self, bundle, out, *, workers=2, seed=None, mortality=0.2, **settings):
        super().__init__(bundle, out, workers=f"inline:{workers}" if workers else "", **settings)
        InlineCrew.broker = self.broker
        InlineCrew.chance = None if seed is None else random.Random(seed)
        InlineCrew.mortality = mortality

    def act(self):
        super().act()
        if self.config.workers:
            InlineCrew.last.step()

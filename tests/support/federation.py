"""A federation of real processes, and what its files and logs say of it afterwards."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from edgetrain.coordinator.audit import verify_audit
from edgetrain.coordinator.audit.verify import records_of
from edgetrain.coordinator.broker import EmbeddedBroker, Mosquitto, free_port
from edgetrain.protocol.signing import SigningKey
from support.processes import Process, Processes, wait_for
from support.tiny_bundle import make_data

# One thread each: there are more processes than processors.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Federation:
    """Writes the configurations; starts, kills and reads.

    Args:
        processes: the fixture.
        path: for everything.
        bundle: to train.
        broker: "mosquitto", "mosquitto-3.1.1" or "embedded", started here.
        clients: how many; each gets data of its own.
        of_clients: further settings of single clients, by name.
        settings: of the coordinator, in place of the defaults below.
    """

    def __init__(
        self,
        processes: Processes,
        path: Path,
        bundle: Path,
        *,
        broker: str = "mosquitto",
        clients: int = 3,
        data: list[tuple[np.ndarray, np.ndarray]] | None = None,
        test: tuple[np.ndarray, np.ndarray] | None = None,
        of_clients: dict[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.processes = processes
        self.path = path
        self.run = path / "run"
        self.port = free_port()
        self._kind = broker
        self._broker: Mosquitto | EmbeddedBroker | None = None
        # Clients may be heard, and the broker be killed for it, before the call that started it has returned.
        self._starting = threading.Lock()
        self.start_broker()
        version = {"mosquitto": "auto", "mosquitto-3.1.1": "3.1.1", "embedded": "3.1.1"}[broker]
        address = {"host": "127.0.0.1", "port": self.port, "mqtt_version": version, "connect_timeout_seconds": 20.0}
        self.names = [f"client-{number}" for number in range(1, clients + 1)]
        shards = data or [make_data(40, seed=number) for number in range(clients)]
        for name, (x, y) in zip(self.names, shards, strict=True):
            np.savez(path / f"{name}.npz", inputs=x, targets=y)
            config = {"name": name, "federation": "f", "data": str(path / f"{name}.npz"),
                      "state": str(path / name), "broker": address}  # fmt: skip
            config |= (of_clients or {}).get(name, {})
            (path / f"{name}.toml").write_text(tomli_w.dumps(config))
        x, y = test or make_data(200, seed=99)
        np.savez(path / "test.npz", inputs=x, targets=y)
        rounds = {"total": 20, "goal": clients, "minimum": 2, "deadline_seconds": 20.0, "gather_seconds": 20.0,
                  "idle_timeout_seconds": 40.0} | settings.pop("rounds", {})  # fmt: skip
        config = {
            "federation": "f",
            "bundle": str(bundle),
            "out": str(self.run),
            "broker": address,
            "rounds": rounds,
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 0.1},
            "evaluation": {"data": str(path / "test.npz")},
        } | settings
        (path / "federation.toml").write_text(tomli_w.dumps(config))

    # --- processes -----------------------------------------------------------------------------------

    def start_broker(self) -> None:
        with self._starting:
            self._broker = EmbeddedBroker(self.port) if self._kind == "embedded" else Mosquitto(self.port)

    def stop_broker(self) -> None:
        if self._broker:
            self._broker.stop()
            self._broker = None

    def kill_broker(self) -> None:
        """kill -9; mosquitto only."""
        with self._starting:
            assert isinstance(self._broker, Mosquitto)
            os.kill(self._broker.pid, signal.SIGKILL)
            self.stop_broker()

    def start_coordinator(self) -> Process:
        return self.processes.edgetrain(
            "coordinator", "--config", self.path / "federation.toml", log=self.path / "coordinator.log", env=ENVIRONMENT
        )

    def start_client(self, name: str) -> Process:
        return self.processes.edgetrain(
            "client", "--config", self.path / f"{name}.toml", log=self.path / f"{name}.log", env=ENVIRONMENT
        )

    def start_clients(self) -> dict[str, Process]:
        return {name: self.start_client(name) for name in self.names}

    # --- what happened -------------------------------------------------------------------------------

    def rounds_done(self) -> int:
        path = self.run / "rounds.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_rounds(self, count: int, coordinator: Process) -> None:
        wait_for(lambda: self.rounds_done() >= count or not coordinator.running(), f"round {count}\n{coordinator.log}")
        assert self.rounds_done() >= count, coordinator.output

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "rounds.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run / "summary.json").read_bytes())
        return summary

    def accepted_by_coordinator(self) -> list[tuple[str, int]]:
        """(client, round) of every row of clients.csv that was accepted."""
        rows = csv.DictReader((self.run / "clients.csv").read_text().splitlines())
        return sorted((row["client"], int(row["round"])) for row in rows if row["status"] == "accepted")

    def acknowledged_to_clients(self) -> list[tuple[str, int]]:
        """(client, round) of every update that a client was told is accepted."""
        found = []
        for name in self.names:
            log = (self.path / f"{name}.log").read_text(errors="replace")
            found += [(name, int(number)) for number in re.findall(r"round (\d+): update of \d+ bytes accepted", log)]
        return sorted(found)

    def refused_to_clients(self) -> list[tuple[str, int]]:
        """(client, round) of every update that a client was told is refused."""
        found = []
        for name in self.names:
            log = (self.path / f"{name}.log").read_text(errors="replace")
            found += [(name, int(number)) for number in re.findall(r"round (\d+): update refused", log)]
        return sorted(found)

    def check_nothing_lost_or_doubled(self, total: int, *, clients_killed: int = 0, finished: bool = True) -> None:
        """Both ends agree on every single update, and the rounds are 1, 2, 3, … each once.

        A client that is killed in the milliseconds between storing a verdict and logging it has nothing in its
        log: as many may be missing there as clients were killed.
        """
        records = self.records()
        assert [record["round"] for record in records] == list(range(1, total + 1))
        accepted = self.accepted_by_coordinator()
        assert len(set(accepted)) == len(accepted)
        assert len(accepted) == sum(record["accepted"] for record in records)
        acknowledged = self.acknowledged_to_clients()
        assert len(set(acknowledged)) == len(acknowledged)
        assert len(set(accepted) - set(acknowledged)) <= clients_killed, set(accepted) - set(acknowledged)
        assert not set(self.refused_to_clients()) & set(accepted), "what was accepted was never called refused"
        assert not finished or not list((self.run / "journal").iterdir())
        verify_audit(self.run, public_key=SigningKey.load_or_create(self.path / "coordinator.key").public_key)
        recorded = [record for record in records_of(self.run) if record["type"] == "accepted"]
        in_log = {(record["client"], record["round"]) for record in recorded}
        # A round that was left open has its updates in the log only.
        assert in_log == set(accepted) if finished else in_log >= set(accepted)
        assert in_log >= set(acknowledged)
        first = [record for record in recorded if not record.get("from_journal")]
        assert len({(record["client"], record["round"]) for record in first}) == len(first)
        for log in self.path.glob("*.log"):
            assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")

"""A federation in one process whose clients and coordinator can end at any step, and what the result must be."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from edgetrain.coordinator.config import EvaluationConfig, RoundsConfig
from edgetrain.coordinator.secure.config import SecureAggregationConfig
from edgetrain.coordinator.secure.round import SecureRound
from edgetrain.edge_client.privacy import secure_aggregation as participation
from edgetrain.protocol.training import TrainingConfig
from support.in_memory import Federation, shards

# The clients' time for a step: more than any takes. `leap` over it when one will not come.
PHASE_SECONDS = 60.0
CODEC = "randk:0.5|int8:block=all:stochastic|packed"
SIZES = (30, 40, 50, 20, *range(21, 32))


class Crash(BaseException):
    """The process ends here: nothing of ours may catch it."""


class SecureFederation(Federation):
    """Clients in threads. What each of them quantized is noted, by round."""

    def __init__(self, directory: Path, bundle: Path, monkeypatch, clients: int = 3, **client_settings) -> None:
        super().__init__(directory, bundle, shards(SIZES[:clients]), **client_settings)
        self.monkeypatch = monkeypatch
        self.quantized: dict[str, list] = {}
        self.crashed = threading.Event()
        plain = participation.quantize

        def quantize(*arguments, **options):
            result = plain(*arguments, **options)
            name = threading.current_thread().name
            self.quantized.setdefault(name, []).append((arguments, result))
            return result

        monkeypatch.setattr(participation, "quantize", quantize)

    def start(self) -> None:
        for name in self.clients:
            self.start_client(name)

    def start_client(self, name: str) -> None:
        thread = threading.Thread(target=self._run, args=(self.clients[name],), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, client) -> None:
        try:
            super()._run(client)
        finally:
            if any(isinstance(failure, Crash) for failure in self.failures):
                self.failures.clear()
                self.broker.drop(client._transport)
                client._state.close()
                self._states.remove(client._state)
                self.crashed.set()

    def restart_client(self, name: str) -> None:
        """Once it has crashed."""
        assert self.crashed.wait(20)
        self._add(name, self._data[name])
        self.start_client(name)

    def secure_coordinator(self, *, secure: dict | None = None, rounds: dict | None = None, **settings):
        goal = len(self.clients)
        defaults = {"total": 2, "goal": goal, "minimum": goal, "deadline_seconds": 20.0, "gather_seconds": 20.0}
        return self.coordinator(
            codec=CODEC,
            rounds=RoundsConfig(**(defaults | (rounds or {}))),
            training=TrainingConfig(epochs=1, batch_size=8, learning_rate=0.1),
            evaluation=EvaluationConfig(by_clients=False),
            secure_aggregation=SecureAggregationConfig(
                **({"enabled": True, "phase_seconds": PHASE_SECONDS} | (secure or {}))
            ),
            **settings,
        )

    def crash_client(self, name: str, phase: str, *, missed: bool = False) -> None:
        """That client ends once, when it has stored that it is in this phase and before anyone hears so.

        Args:
            name: of the client.
            phase: see `Member`.
            missed: whether it comes back after its time is over.
        """
        plain = participation.SecureParticipation._keep
        armed = [True]

        def keep(this, of, member):
            plain(this, of, member)
            if this._config.name == name and member.phase == phase and armed:
                armed.clear()
                if missed:
                    self.leap(PHASE_SECONDS)
                raise Crash

        self.monkeypatch.setattr(participation.SecureParticipation, "_keep", keep)

    def crash_coordinator(self, phase: str, *, told: bool) -> None:
        """The coordinator ends once, when it has entered this phase: before or after it told clients so."""
        plain = SecureRound._tell
        step = SecureRound.step
        armed = [True]

        def tell(this, client):
            if this.server.phase == phase and armed and not told:
                armed.clear()
                raise Crash
            plain(this, client)

        def stepped(this, **options):
            done = step(this, **options)
            if this.server.phase == phase and armed:
                armed.clear()
                raise Crash
            return done

        self.monkeypatch.setattr(SecureRound, "_tell", tell)
        self.monkeypatch.setattr(SecureRound, "step", stepped)

    def parameters(self) -> np.ndarray:
        """The latest, in the order of their names."""
        from safetensors.numpy import load_file

        tensors = load_file(self.directory / "run" / "parameters.safetensors")
        return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])

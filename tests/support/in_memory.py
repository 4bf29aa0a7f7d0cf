"""A whole federation in one process: the real coordinator and clients, over the broker in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetrain.coordinator import events
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.serve import coordinator_kind
from edgetrain.edge_client.client import Client, connection_will, new_connection
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.transport.memory import MemoryBroker
from support.tiny_bundle import make_data


class Federation:
    """Clients in threads; the coordinator runs where `run` is called.

    Args:
        directory: for everything.
        bundle: path.
        shards: (inputs, targets) of each client.
        client_settings: of every client.
    """

    def __init__(
        self, directory: Path, bundle: Path, shards: Sequence[tuple[np.ndarray, np.ndarray]], **client_settings: Any
    ):
        self.client_settings = client_settings
        self.directory, self.bundle, self.broker = directory, bundle, MemoryBroker()
        self.clients: dict[str, Client] = {}
        self._data: dict[str, Path] = {}
        # How long clients were sent away.
        self.pauses: list[float] = []
        self.failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._states: list[ClientState] = []
        self._directories: list[RunDirectory] = []
        # How far the coordinators' clock is put forward.
        self._ahead = 0.0
        for number, (inputs, targets) in enumerate(shards):
            np.savez(directory / f"shard-{number}.npz", inputs=inputs, targets=targets)
            self._data[f"client-{number}"] = directory / f"shard-{number}.npz"
        self.reopen()

    def reopen(self) -> None:
        """New client processes, so to speak, over the same directories."""
        for name, data in self._data.items():
            self._add(name, data)

    def _add(self, name: str, data: Path) -> None:
        config = ClientConfig(
            name=name,
            federation="test",
            data=str(data),
            state=str(self.directory / name),
            **{"validation_fraction": 0.0} | self.client_settings,
        )
        state = ClientState(Path(config.state))
        self._states.append(state)
        self.clients[name] = self._make(config, state)

    def _make(self, config: ClientConfig, state: ClientState, run: bytes | None = None) -> Client:
        connection = new_connection()
        transport = self.broker.connect(will=connection_will(config, state, connection))
        return Client(config, state=state, transport=transport, connection=connection, run=run)

    def start(self) -> None:
        for client in self.clients.values():
            thread = threading.Thread(target=self._run, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, client: Client) -> None:
        try:
            while (pause := client.run()) is not None:
                self.pauses.append(pause)
                time.sleep(pause)
                client = self._make(client._config, client._state, client.joined)
        except BaseException as error:  # shown by `finish`
            self.failures.append(error)

    def leap(self, seconds: float) -> None:
        """Lets that much time pass for the coordinators: for tests that know that nothing more will come."""
        self._ahead += seconds

    def coordinator(
        self, *, observe: Callable[[events.Event], None] = lambda _event: None, evaluate=None, **settings
    ) -> Coordinator:
        bundle = Bundle(self.bundle)
        config = FederationConfig(
            federation="test", bundle=str(self.bundle), out=str(self.directory / "run"), **settings
        )
        directory = RunDirectory(config, bundle.manifest, bundle.digest)
        self._directories.append(directory)
        return coordinator_kind(config)(
            config,
            bundle=bundle,
            transport=self.broker.connect(),
            directory=directory,
            observe=observe,
            evaluate=evaluate,
            clock=lambda: time.monotonic() + self._ahead,
        )

    def close(self) -> None:
        """For tests whose clients never ran."""
        self.close_directories()
        for state in self._states:
            state.close()
        self._states.clear()

    def close_directories(self) -> None:
        for directory in self._directories:
            directory.close()
        self._directories.clear()

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(20)
        alive = [thread for thread in self._threads if thread.is_alive()]
        self.close()
        self._threads.clear()
        if self.failures:
            raise self.failures[0]
        assert not alive, "clients did not leave"


def shards(sizes: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Learnable data of the tiny bundle, another part for every client."""
    return [make_data(size, seed=100 + number) for number, size in enumerate(sizes)]

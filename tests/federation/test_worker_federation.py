"""Real clients, a real broker, and a coordinator whose workers are killed one after the other."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from edgetrain.coordinator.broker import find_mosquitto
from support.federation import Federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


def test_workers_are_killed_all_the_time_and_nothing_is_lost(processes, tiny_bundle, tmp_path):
    federation = Federation(
        processes, tmp_path, tiny_bundle, clients=4, workers="processes:2", rounds={"total": 30, "goal": 4}
    )
    try:
        clients = federation.start_clients()
        coordinator = federation.start_coordinator()
        killed = set()
        for number in range(1, 20, 2):
            federation.wait_for_rounds(number, coordinator)
            # The third child is multiprocessing's own.
            workers = [child for child in psutil.Process(coordinator.pid).children()
                       if "spawn_main" in " ".join(child.cmdline())]  # fmt: skip
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.add(workers[0].pid)
        assert coordinator.wait() == 0, coordinator.output
        for client in clients.values():
            assert client.wait() == 0, client.output
    finally:
        processes.end_all()
        federation.stop_broker()
    assert coordinator.output.count("has died") == len(killed) == 10
    federation.check_nothing_lost_or_doubled(30)


def test_the_broker_is_killed_under_workers_and_nothing_is_lost(processes, tiny_bundle, tmp_path):
    federation = Federation(
        processes, tmp_path, tiny_bundle, clients=4, workers="processes:2", rounds={"total": 40, "goal": 4}
    )
    try:
        clients = federation.start_clients()
        coordinator = federation.start_coordinator()
        for number in (2, 6, 10):
            federation.wait_for_rounds(number, coordinator)
            federation.kill_broker()
            time.sleep(0.5)
            federation.start_broker()
        assert coordinator.wait() == 0, coordinator.output
        for client in clients.values():
            assert client.wait() == 0, client.output
    finally:
        processes.end_all()
        federation.stop_broker()
    federation.check_nothing_lost_or_doubled(40)

"""Workers as processes and on Ray, through a real broker; one is killed in the middle of a round."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys

import pytest
from tests.coordinator.test_coordinator import expected_parameters

from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.coordinator.parameters import decode_parameters
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import ConfigError
from support.spread import serve_with_workers

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
NAMES = [f"c{number:02d}" for number in range(12)]


def check(bundle, out, crowd, summary):
    """Against a sum made here from the clients' deltas, without any of the coordinator's code."""
    assert (summary.status, summary.rounds, summary.updates) == ("completed", 2, 24)
    found = decode_parameters((out / "parameters.safetensors").read_bytes(), Bundle(bundle).manifest)
    assert found.tobytes() == expected_parameters(NAMES, 2).tobytes()
    accepted = [(name, verdict.round) for name, verdict in crowd.verdicts if verdict.accepted]
    assert set(accepted) == {(name, number) for name in NAMES for number in (1, 2)}
    assert all(verdict.accepted for _, verdict in crowd.verdicts)


def test_two_processes_one_killed_give_the_single_process_result(tiny_bundle, ram_path):
    killed = []

    def kill(crew):
        killed.append(crew.pids[0])
        os.kill(killed[0], signal.SIGKILL)

    summary, crowd = serve_with_workers(tiny_bundle, ram_path / "spread", "processes:2", NAMES, kill)
    check(tiny_bundle, ram_path / "spread", crowd, summary)
    assert len(killed) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)
    single, alone = serve_with_workers(tiny_bundle, ram_path / "single", "", NAMES)
    check(tiny_bundle, ram_path / "single", alone, single)


@needs_ray
@pytest.mark.slow
def test_two_ray_workers_one_killed_give_the_single_process_result(tiny_bundle, ram_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    killed = []
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:

        def kill(crew):
            killed.append(crew.actors[0])
            ray.kill(crew.actors[0])

        summary, crowd = serve_with_workers(tiny_bundle, ram_path / "ray", "ray:2", NAMES, kill)
    finally:
        ray.shutdown()
    check(tiny_bundle, ram_path / "ray", crowd, summary)
    assert killed


def test_without_ray_the_error_says_how_to_get_it(tiny_bundle, ram_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'edgetrain\[ray\]'"):
        serve_with_workers(tiny_bundle, ram_path / "run", "ray:2", NAMES)

"""kill -9 at random moments: nothing lost, nothing twice, and the parameters of an undisturbed run to the bit."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.coordinator.test_coordinator import expected_parameters

from edgetrain.protocol.bundle import Bundle
from support import kill_nine


@pytest.mark.parametrize(("seed", "kills"), [(1, 40), pytest.param(2, 500, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tiny_bundle, ram_path, seed, kills):
    script = Path(kill_nine.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, script, tiny_bundle, ram_path, str(seed), str(kills)],
        capture_output=True, text=True, env=environment, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, runs = map(int, re.search(r"killed (\d+), runs (\d+)", done.stdout).groups())
    assert killed >= kills
    expected = expected_parameters(kill_nine.NAMES, kill_nine.ROUNDS)
    everything = {(name, number) for name in kill_nine.NAMES for number in range(1, kill_nine.ROUNDS + 1)}
    for number in range(runs):
        place = ram_path / f"run-{number}"
        check_run(place, tiny_bundle, expected, everything)


def check_run(place, bundle, expected, everything):
    manifest = Bundle(bundle).manifest
    tensors = safetensors.numpy.load_file(place / "run" / "parameters.safetensors")
    found = np.concatenate([tensors[entry.name].reshape(-1) for entry in manifest.parameters])
    assert found.tobytes() == expected.tobytes()
    with (place / "run" / "clients.csv").open() as file:
        counted = [(row["client"], int(row["round"])) for row in csv.DictReader(file) if row["status"] == "accepted"]
    assert len(counted) == len(set(counted)), "counted twice"
    assert set(counted) == everything
    told = [line.split() for line in (place / "verdicts.log").read_text().splitlines()]
    assert all(accepted == "True" for _, _, accepted in told), "an accepted update was called refused"
    assert {(name, int(number)) for name, number, _ in told} <= set(counted), "an acknowledged update was lost"

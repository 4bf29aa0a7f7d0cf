"""kill -9 of clients in any phase: no residual, control variate or personal parameter is lost or counted twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from support import kill_clients
from support.tiny_bundle import SHAPES

PERSONAL = sum(int(np.prod(shape)) for name, shape in SHAPES.items() if name.startswith("second."))


@pytest.mark.parametrize(("seed", "kills"), [(1, 12), pytest.param(2, 200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tiny_bundle, ram_path, seed, kills):
    script = Path(kill_clients.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, script, tiny_bundle, ram_path, str(seed), str(kills)],
        capture_output=True, text=True, env=environment, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, runs = map(int, re.search(r"killed (\d+), runs (\d+)", done.stdout).groups())
    assert killed >= kills
    expected = final(ram_path / "undisturbed")
    assert any(array.any() for array in expected.values())
    for number in range(runs):
        found = final(ram_path / f"run-{number}")
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in expected.items()
        }, number


def final(place):
    """The parameters and the coordinator's control variate, sums over everything that every client kept; and what each
    keeps for itself."""
    run = place / "run"
    arrays = safetensors.numpy.load_file(run / "parameters.safetensors")
    for path in (run / "strategy").iterdir():
        arrays |= {f"strategy/{name}": array for name, array in safetensors.numpy.load_file(path).items()}
    for number in range(len(kill_clients.SIZES)):
        data = (place / f"client-{number}/personal.bin").read_bytes()
        header_bytes = int.from_bytes(data[4:8], "little")
        # Of now and of the round before; the header names the run, which is another every time.
        arrays[f"personal/{number}"] = np.frombuffer(data[12 + header_bytes :], "<f4")
        assert len(arrays[f"personal/{number}"]) == 2 * PERSONAL
    return arrays

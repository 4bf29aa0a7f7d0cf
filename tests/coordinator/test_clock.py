"""Clocks that jump: no deadline, no patience and no repetition reads the wall clock."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.coordinator.test_coordinator import expected_parameters
from tests.coordinator.test_kill_nine import check_run

from support import kill_nine

ROOT = Path(__file__).parents[2]
# What people read, and what must grow across restarts (which `Serials` sees to when the clock goes backwards).
STAMPS = {
    "coordinator/audit/log.py",
    "coordinator/authority/federation.py",
    "coordinator/observability/event_log.py",
    "coordinator/observability/tensorboard.py",
    "coordinator/post.py",
    "coordinator/run/serials.py",
}
# Hours of the day are the wall clock's.
QUIET_HOURS = {"edge_client/host/policy.py"}
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}


@pytest.mark.parametrize("folder", ["coordinator", "edge_client", "protocol", "simulation"])
def test_the_wall_clock_is_read_for_stamps_only(folder):
    readers = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and any(ast.unparse(node).endswith(name) for name in WALL):
                readers.add(path.relative_to(ROOT).as_posix())
    assert readers <= STAMPS | QUIET_HOURS


JUMPING = """
import sys, time, random
real, chance = time.time, random.Random(5)
# By up to a year, in either direction, at every look.
time.time = lambda: real() + chance.uniform(-3e7, 3e7)
time.time_ns = lambda: int(time.time() * 1e9)
from pathlib import Path
from support.kill_nine import forked
place = Path(sys.argv[2])
for kill_after in (0.1, 0.05, 0.2, None):
    forked(Path(sys.argv[1]), place, kill_after)
"""


def test_a_run_over_a_clock_that_jumps_is_the_same_to_the_bit(tiny_bundle, ram_path):
    """Also across restarts: announcements are still believed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    command = [sys.executable, "-c", JUMPING, tiny_bundle, ram_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    everything = {(name, number) for name in kill_nine.NAMES for number in range(1, kill_nine.ROUNDS + 1)}
    check_run(ram_path, tiny_bundle, expected_parameters(kill_nine.NAMES, kill_nine.ROUNDS), everything)

"""Disks that are full or read-only: said, nothing lost, and it goes on when there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.coordinator.test_coordinator import expected_parameters
from tests.coordinator.test_kill_nine import check_run

from support import kill_nine, small_disk

UNSHARE = ["unshare", "-rm"]


def can_mount():
    try:
        mount = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "x", "/mnt"], check=False, capture_output=True)
    except OSError:
        return False
    return mount.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user cannot mount file systems, not even of its own")
def test_full_and_read_only_disks(tiny_bundle, ram_path):
    script = Path(small_disk.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), *sys.path])}
    done = subprocess.run(
        [*UNSHARE, sys.executable, script, tiny_bundle, ram_path],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    *full, read_only, later = done.stdout.splitlines()
    assert all("Read-only file system" in line or "readonly" in line for line in (read_only, later)), done.stdout
    expected = expected_parameters(kill_nine.NAMES, kill_nine.ROUNDS)
    everything = {(name, number) for name in kill_nine.NAMES for number in range(1, kill_nine.ROUNDS + 1)}
    said = [line.partition(": ")[2].split(" | ") for line in full]
    assert sum(bool(first) for first, _ in said) >= 4, done.stdout
    for number, (first, second) in enumerate(said):
        for words in (first, second):
            assert not words or "No space left" in words or "disk is full" in words, words
        check_run(ram_path / f"kept-{number}", tiny_bundle, expected, everything)
    check_run(ram_path / "kept-read-only", tiny_bundle, expected, everything)

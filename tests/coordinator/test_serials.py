"""Serials grow, whatever the clock does and however often the process dies."""

from __future__ import annotations

import pytest

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.serials import Serials


def test_they_follow_the_clock_and_never_go_back(tmp_path):
    now = [1_000_000.0]
    path = tmp_path / "serial"
    serials = Serials(path, clock=lambda: now[0])
    assert serials() == 1_000_000_000
    assert serials() == 1_000_000_001
    now[0] += 5
    assert serials() == 1_000_005_000
    last = serials()
    for step in (-3600.0, -1e6, 60.0, 120.0, -10.0):
        now[0] = max(0.0, now[0] + step)
        serials = Serials(path, clock=lambda: now[0])  # a new process
        for _ in range(3):
            following = serials()
            assert following > last
            last = following


def test_a_damaged_file_says_what_to_do(tmp_path):
    (tmp_path / "serial").write_text("x")
    with pytest.raises(RunError, match="remove it"):
        Serials(tmp_path / "serial")

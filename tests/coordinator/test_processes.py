"""Child processes end with their parent, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from edgetrain.coordinator.processes import spawn, stop
from support.processes import wait_for

PARENT = """
import sys, time
from edgetrain.coordinator.processes import spawn
print(spawn([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_does_not_outlive_a_parent_that_is_killed(number):
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.send_signal(number)
        parent.wait()
    try:
        wait_for(lambda: not child.is_running() or child.status() == "zombie", "the child to end", seconds=10)
    finally:
        if child.is_running():
            child.kill()


def test_ctrl_c_in_the_terminal_reaches_only_the_parent():
    child = spawn([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert os.getpgid(child.pid) != os.getpgid(0)
    finally:
        assert stop(child) == -signal.SIGTERM


def test_stop_ends_also_what_does_not_listen():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = spawn([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert stop(child, seconds=0.2) == -signal.SIGKILL
    assert stop(child) == -signal.SIGKILL, "idempotent"
    child.stdout.close()

"""What this device is, and what this process takes of it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import psutil

from edgetrain.protocol.messages import DeviceInfo


def device_info() -> DeviceInfo:
    """System, machine, processors and memory."""
    return DeviceInfo(
        system=platform.system()[:100],
        machine=platform.machine()[:100],
        cpus=os.cpu_count() or 0,
        memory_mb=psutil.virtual_memory().total >> 20,
    )


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (2^20 bytes)."""
    # Not ru_maxrss on Linux: it survives exec, so a child starts with its parent's peak.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)

"""What this device is, and what this process takes of it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import psutil

from edgetrain.protocol.messages import DeviceInfo, DeviceState


def device_info() -> DeviceInfo:
    """System, machine, processors and memory."""
    return DeviceInfo(
        system=platform.system()[:100],
        machine=platform.machine()[:100],
        cpus=os.cpu_count() or 0,
        memory_mb=psutil.virtual_memory().total >> 20,
    )


def device_state() -> DeviceState:
    """Battery, memory and heat as they are now, as far as this system tells."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    heat = [reading.current for readings in sensors.values() for reading in readings if reading.current]
    return DeviceState(
        battery_percent=round(float(battery.percent), 1) if battery else None,
        charging=None if battery is None or battery.power_plugged is None else bool(battery.power_plugged),
        network=_network(),
        free_memory_mb=psutil.virtual_memory().available >> 20,
        temperature_c=round(max(heat), 1) if heat else None,
    )


def is_news(told: DeviceState, now: DeviceState) -> bool:
    """Whether a device's state has changed enough to tell the coordinator."""
    return (
        (told.charging, told.network) != (now.charging, now.network)
        or _apart(told.battery_percent, now.battery_percent, 5.0)
        or _apart(told.temperature_c, now.temperature_c, 5.0)
        or _apart(told.free_memory_mb, now.free_memory_mb, 0.25 * (told.free_memory_mb or 0))
    )


def _apart(told: float | None, now: float | None, by: float) -> bool:
    if told is None or now is None:
        return told is not now
    return abs(now - told) > by


def _network() -> str:
    """The kind of the fastest guess: the first interface that is up and not the loopback."""
    kinds = {"wl": "wifi", "en": "ethernet", "eth": "ethernet", "ww": "cellular", "rmnet": "cellular"}
    try:
        interfaces = psutil.net_if_stats()
    except OSError:  # Android and emulators do not let everybody ask
        return ""
    for name, stats in sorted(interfaces.items()):
        if stats.isup:
            for prefix, kind in kinds.items():
                if name.startswith(prefix):
                    return kind
    return ""


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

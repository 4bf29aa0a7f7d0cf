"""A run on a disk that is full, or read-only, and then is not: `unshare -rm python small_disk.py BUNDLE DIRECTORY`.

In a mount namespace of its own, with real file systems in memory. What each run leaves is copied to
DIRECTORY/kept-N, where it survives the namespace.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from edgetrain.coordinator.errors import RunError
from support.kill_nine import serve

FULL_AT_KB = (48, 96, 144, 160, 176, 200)


def mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)


def log_of(place: Path) -> Path:
    """Where the clients write, which is another disk."""
    return place.parent / "verdicts.log"


def keep(place: Path, name: str) -> None:
    shutil.copytree(place, place.parent / name)
    log_of(place).rename(place.parent / name / "verdicts.log")


def refused(bundle: Path, place: Path) -> str:
    """What is said when the coordinator cannot go on; empty if it can."""
    try:
        serve(bundle, place, log_of(place))
    except RunError as error:
        return str(error)
    return ""


def fills_up(bundle: Path, place: Path, size_kb: int) -> str:
    mount(place, f"size={size_kb}k")
    said = refused(bundle, place)
    again = refused(bundle, place) if said else ""
    mount_again(place, "size=10m")
    serve(bundle, place, log_of(place))
    return f"{said} | {again}"


def mount_again(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def main(bundle: Path, directory: Path) -> None:
    place = directory / "disk"
    place.mkdir()
    for number, size_kb in enumerate(FULL_AT_KB):
        print(f"full at {size_kb} kB: {fills_up(bundle, place, size_kb)}")
        keep(place, f"kept-{number}")
        subprocess.run(["umount", place], check=True)
    mount(place, "size=10m")
    (place / "run").mkdir()
    mount_again(place, "ro")
    print(f"read-only: {refused(bundle, place)}")
    mount_again(place, "rw")
    serve(bundle, place, log_of(place))
    mount_again(place, "ro")
    print(f"read-only later: {refused(bundle, place)}")
    mount_again(place, "rw")
    serve(bundle, place, log_of(place))
    keep(place, "kept-read-only")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

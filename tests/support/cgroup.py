"""A memory limit as systemd sets it: a cgroup, version 2 or 1, where this machine lets us make one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A cgroup of its own.

    Args:
        path: its directory, there already.
        limit: bytes.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.version_2 = (path / "memory.max").exists()
        (path / ("memory.max" if self.version_2 else "memory.limit_in_bytes")).write_text(str(limit))

    def enter(self) -> None:
        """For the child, before it becomes another program."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def kills(self) -> int:
        """How often the kernel has killed somebody in it for want of memory."""
        text = (self.path / ("memory.events" if self.version_2 else "memory.oom_control")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup | None]:
    """A group with a limit, or None where there is none to be had."""
    name = f"edgetrain-test-{os.getpid()}"
    made = None
    for parent in (ROOT, ROOT / "memory", ROOT / "unified"):
        path = parent / name
        try:
            path.mkdir()
        except OSError:
            continue
        if (path / "memory.max").exists() or (path / "memory.limit_in_bytes").exists():
            made = path
            break
        path.rmdir()
    try:
        yield MemoryGroup(made, limit) if made else None
    finally:
        if made:
            made.rmdir()

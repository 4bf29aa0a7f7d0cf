"""Real processes of the command line, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

WAIT_SECONDS = 60.0


def wait_for(condition: Callable[[], object], what: str, *, seconds: float = WAIT_SECONDS) -> None:
    """Looks now and then whether other processes have got there; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not after {seconds:.0f} s")
        time.sleep(0.02)


class Process:
    """One running command, its output in a file."""

    def __init__(self, arguments: Sequence[str | os.PathLike[str]], log: Path, **options: object) -> None:
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(  # type: ignore[call-overload]
                [os.fspath(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                **options,
            )
        # Every process that was ever seen below this one, by (id, start time): ids are used again.
        self.family: dict[int, psutil.Process] = {}

    @property
    def pid(self) -> int:
        return int(self.popen.pid)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        return self.popen.poll() is None

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Its exit status."""
        try:
            return int(self.popen.wait(seconds))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.output}") from None

    def kill(self) -> None:
        """kill -9."""
        self.popen.kill()
        self.popen.wait()

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self.popen.send_signal(signal.SIGINT)

    def note_family(self) -> None:
        """Remembers the children that it has now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                self.family[child.pid] = child

    def orphans(self) -> list[psutil.Process]:
        """Children noted earlier that are still there."""
        return [child for child in self.family.values() if child.is_running() and child.status() != "zombie"]


class Processes:
    """Starts processes and ends what is left of them."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def start(self, arguments: Sequence[str | os.PathLike[str]], log: Path, **options: object) -> Process:
        process = Process(arguments, log, **options)
        self._started.append(process)
        return process

    def edgetrain(self, *arguments: str | os.PathLike[str], log: Path, **options: object) -> Process:
        """Starts `edgetrain ARGUMENTS`."""
        return self.start([sys.executable, "-m", "edgetrain", *arguments], log, **options)

    def end_all(self) -> None:
        for process in self._started:
            process.note_family()
            if process.running():
                process.kill()
            for child in process.orphans():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()

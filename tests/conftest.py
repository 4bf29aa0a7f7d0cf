"""What all tests share: one exported bundle per session, and processes that do not outlive their test."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from support.processes import Processes
from support.tiny_bundle import write_tiny_bundle

# The same examples on every machine and in every run; a slow machine is not a failure.
settings.register_profile("edgetrain", deadline=None, derandomize=True)
settings.load_profile("edgetrain")
# Whoever was started in the background by a script ignores Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _tests_keep_their_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients give memory back between graphs; for those in this process, which is larger, it took most of the time."""
    if request.path.name != "test_memory.py":
        for module in ("durable.installation", "runtimes.session"):
            monkeypatch.setattr(f"edgetrain.edge_client.{module}.give_back_memory", lambda: None)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle directory of 66 parameters, made without torch."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-cnn as `edgetrain export` writes it, in a process of its own: no test process loads torch for it."""
    command = [sys.executable, "-m", "edgetrain", "-q", "export", "digits-cnn", "--micro-batch", "32", "-o"]
    return _made_once(tmp_path_factory, "digits-cnn.edge", command)


@pytest.fixture(scope="session")
def private_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 66 parameters with per-sample clipping, exported in a process of its own."""
    script = Path(__file__).parent / "support" / "private_bundle.py"
    return _made_once(tmp_path_factory, "private", [sys.executable, script])


def _made_once(factory: pytest.TempPathFactory, name: str, command: Sequence[str | Path]) -> Path:
    """What a command writes to its last argument, for all processes of the suite: the first one runs it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            subprocess.run([*command, out], check=True, capture_output=True)
    return out


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is such a thing, for tests that sync a thousand times."""
    base = Path("/dev/shm")
    if not os.access(base, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="edgetrain-tests-", dir=base) as path:
        yield Path(path)


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Starts processes; ends those that are left, by id."""
    started = Processes()
    yield started
    started.end_all()

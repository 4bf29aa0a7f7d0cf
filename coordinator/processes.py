"""Child processes that do not outlive us."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1


def spawn(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a program that gets SIGTERM when this process dies, even by kill -9 (on Linux).

    It runs in a session of its own, so that Ctrl-C reaches only us, who then stop it in order.

    Args:
        arguments: program and arguments; no shell.
        options: as for `subprocess.Popen`.

    Raises:
        OSError: it cannot be started.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        options["preexec_fn"] = die_with_parent
    return subprocess.Popen(arguments, start_new_session=True, **options)  # noqa: S603


def stop(process: subprocess.Popen[bytes], *, seconds: float = 5.0) -> int:
    """Ends a process: SIGTERM, and SIGKILL if it is still there after `seconds`. Returns its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()

"""What people ask of a running coordinator: a small file in its run directory that it looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from edgetrain.coordinator.errors import RunError
from edgetrain.protocol.files import write_atomically

Request = Literal["run", "pause", "stop"]

FILE = "request"


def write_request(directory: Path, request: Request) -> None:
    """Asks the coordinator of a run directory to pause after its round, to go on, or to end.

    Raises:
        RunError: no run directory, or not writable.
    """
    if not (directory / "run.json").is_file():
        raise RunError(f"{directory}: holds no run")
    try:
        write_atomically(directory / FILE, f"{request}\n".encode())
    except OSError as error:
        raise RunError(f"{directory / FILE}: {error}") from error


def read_request(directory: Path) -> Request:
    """What was asked last; "run" if nothing was, or nothing that is known."""
    try:
        text = (directory / FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return "run"
    return cast("Request", text) if text in get_args(Request) else "run"

"""Which run a directory holds: run.json."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edgetrain.coordinator.errors import RunError
from edgetrain.protocol.files import write_atomically


class _RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int = 1
    run: str
    federation: str
    bundle: str


def load_or_create_run(directory: Path, *, federation: str, bundle: bytes) -> bytes:
    """The id of the run in a directory, 16 bytes; a new one if there is none.

    Args:
        directory: the run directory.
        federation: its name.
        bundle: digest of the bundle.

    Raises:
        RunError: it holds another run, or the file is damaged.
        OSError: not writable.
    """
    path = directory / "run.json"
    if not path.exists():
        info = _RunInfo(run=os.urandom(16).hex(), federation=federation, bundle=bundle.hex())
        write_atomically(path, msgspec.json.encode(info))
    try:
        info = msgspec.json.decode(path.read_bytes(), type=_RunInfo)
        run = bytes.fromhex(info.run)
        if len(run) != 16:
            raise ValueError("the run's id has not 16 bytes")
    except (msgspec.DecodeError, ValueError) as error:
        raise RunError(f"{path}: damaged: {error}") from error
    if info.format_version != 1 or info.federation != federation or info.bundle != bundle.hex():
        raise RunError(
            f"{directory}: holds a run of federation {info.federation!r} with bundle {info.bundle[:12]}…, not "
            f"{federation!r} with {bundle.hex()[:12]}…; choose another `out`"
        )
    return run

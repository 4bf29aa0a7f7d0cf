"""What a log is compared with: the key that should have sealed it, and what clients have seen of it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgetrain.coordinator.audit.chain import AuditError
from edgetrain.protocol.checkpoints import SeenCheckpoint
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.signing import SigningKey


def coordinator_key(run: Path, given: str) -> tuple[bytes | None, str]:
    """(the coordinator's public key or None, where from): the one given, or of the key file beside the run.

    Raises:
        ConfigError: what is given is no key.
    """
    if given:
        try:
            key = bytes.fromhex(given)
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ConfigError(f"--key {given[:80]}: is not a public key of 64 hex digits")
        return key, "as given"
    try:
        configured = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).get("key")
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        configured = None
    path = Path(configured) if isinstance(configured, str) and configured else run.absolute().parent / "coordinator.key"
    try:
        return SigningKey(path.read_bytes()).public_key, f"of {path}"
    except (OSError, ValueError):
        return None, "which the log itself names: compare it with coordinator_key in a device file, or give --key"


def seen_by(paths: Sequence[Path], run: Path) -> dict[int, bytes]:
    """Hashes by number of records, from the checkpoints.jsonl of clients, of the run that `run` holds.

    Raises:
        ConfigError: not such a file.
        AuditError: two clients have seen different logs: then no log is right.
    """
    seen: dict[int, bytes] = {}
    for path in paths:
        try:
            lines = path.read_bytes().splitlines()
            checkpoints = [msgspec.json.decode(line, type=SeenCheckpoint) for line in lines]
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not a client's checkpoints.jsonl: {error}") from error
        for checkpoint in checkpoints:
            if checkpoint.run != _run_id(run):
                continue
            if seen.setdefault(checkpoint.records, checkpoint.head_bytes) != checkpoint.head_bytes:
                raise AuditError(f"clients were told different histories of {run} at line {checkpoint.records}")
    return seen


def _run_id(run: Path) -> str:
    try:
        with (run / "audit.jsonl").open("rb") as file:
            found = msgspec.json.decode(file.readline(1 << 16))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return str(found.get("run")) if isinstance(found, dict) else ""

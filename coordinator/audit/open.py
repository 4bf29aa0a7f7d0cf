"""Opening the audit log of a run directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgetrain import __version__
from edgetrain.coordinator.audit.log import AuditLog
from edgetrain.coordinator.audit.records import Opened, Started
from edgetrain.protocol.signing import SigningKey


def open_run_audit(
    directory: Path, *, run: bytes, federation: str, bundle: bytes, key: SigningKey, rounds: int
) -> AuditLog:
    """The audit log of a run, begun if there is none; this process is its next record.

    Args:
        directory: of the run; config.toml is there.
        run: its id.
        federation: its name.
        bundle: digest of the bundle.
        key: the coordinator's.
        rounds: that have closed.

    Raises:
        RunError: the log was edited, is another key's, or cannot be written.
        OSError: config.toml cannot be read.
    """
    opened = Opened(
        run=run.hex(),
        federation=federation,
        bundle=bundle.hex(),
        public_key=key.public_key.hex(),
        rounds_before=rounds,
    )
    log = AuditLog(directory, key=key, opened=opened)
    config = hashlib.sha256((directory / "config.toml").read_bytes()).hexdigest()
    log.append(Started(edgetrain=__version__, config=config, rounds=rounds))
    return log

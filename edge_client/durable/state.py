"""The client's own directory: key, pinned coordinator, bundles, residual.

identity.key         signing key, mode 0600
checkpoints.jsonl    see `edgetrain.protocol.checkpoints`
coordinator.pub      the coordinator's public key, pinned when it was first seen
bundles/DIGEST/      bundles by the SHA-256 of their manifest
partial/             blobs on their way in, see `protocol.partial`
residual.bin         see `error_feedback`
control.bin          see `control_variate`
personal.bin         see `personal`
secure.bin           see `secure_aggregation`
privacy.json         see `edge_client.privacy.sample_budget`
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.durable.control_variate import ControlVariate
from edgetrain.edge_client.durable.error_feedback import ErrorFeedback
from edgetrain.edge_client.durable.garbage import forget_old_bundles
from edgetrain.edge_client.durable.personal import PersonalParameters
from edgetrain.edge_client.errors import StateError
from edgetrain.protocol.checkpoints import CheckpointMemory
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.manifest import MANIFEST_FILE, FileEntry
from edgetrain.protocol.partial import forget_partial_blobs
from edgetrain.protocol.signing import SigningKey


class ClientState:
    """The directory, locked: two clients cannot share it.

    Args:
        path: of the directory.
        key: signs this client's messages; None for one that is made and kept here.

    Raises:
        StateError: in use, or not writable.
    """

    def __init__(self, path: Path, key: SigningKey | None = None) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / "lock").open("w")
        except OSError as error:
            raise StateError(f"{path}: cannot use the state directory: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.key = key or SigningKey.load_or_create(path / "identity.key")
            # What the coordinator has said of its audit log.
            self.checkpoints = CheckpointMemory(path)
        except BaseException as error:
            self._lock.close()
            if isinstance(error, BlockingIOError):
                raise StateError(f"{path}: another client runs with this state directory") from error
            if isinstance(error, OSError):
                raise StateError(f"{path}: cannot use the state directory: {error}") from error
            raise

    def trusted_coordinator(self, configured: str = "") -> bytes | None:
        """The coordinator's public key: the configured one, else the pinned one, else None: the first that comes.

        Raises:
            ConfigError: what is configured is no key.
            StateError: the pinned key cannot be read.
        """
        path = self.path / "coordinator.pub"
        try:
            pinned = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
        except OSError as error:
            raise StateError(f"{path}: cannot read the coordinator's key: {error}") from error
        text = configured.strip() or pinned
        if not text:
            return None
        if not re.fullmatch("[0-9a-fA-F]{64}", text):
            if configured.strip():
                raise ConfigError(f"coordinator_key {text[:80]!r} is not a public key of 64 hex digits")
            raise StateError(f"{path}: is no key; remove it to trust the next coordinator that this client meets")
        return bytes.fromhex(text)

    def pin_coordinator(self, public_key: bytes) -> None:
        """Trusts this key from now on.

        Raises:
            StateError: not writable.
        """
        self._write(self.path / "coordinator.pub", public_key.hex().encode() + b"\n")

    def bundle_directory(self, digest: bytes) -> Path:
        """Where a bundle is or will be."""
        return self.path / "bundles" / digest.hex()

    def has_file(self, digest: bytes, entry: FileEntry) -> bool:
        """Whether a bundle's file is here and whole."""
        path = self.bundle_directory(digest) / entry.file
        try:
            return path.stat().st_size == entry.size and hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
        except OSError:
            return False

    def store_file(self, digest: bytes, name: str, data: bytes) -> None:
        """Stores a verified file of a bundle.

        Raises:
            StateError: not writable.
        """
        path = self.bundle_directory(digest) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"{path.parent}: {error}") from error
        self._write(path, data)

    def forget_bundles(self, *, but: bytes) -> int:
        """Deletes what is not needed any more: old bundles but the newest, and what is left of fetching them.

        Args:
            but: digest of the bundle in use. The one used before is kept too: federations alternate.

        Returns:
            Bytes deleted.
        """
        return forget_partial_blobs(self.path / "partial") + forget_old_bundles(
            self.path / "bundles", current=self.bundle_directory(but)
        )

    def read_manifest(self, digest: bytes) -> bytes | None:
        """manifest.json of a bundle, if it is here and whole."""
        try:
            data = (self.bundle_directory(digest) / MANIFEST_FILE).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).digest() == digest else None

    def error_feedback(self, *, bundle: bytes, run: bytes, num_parameters: int) -> ErrorFeedback:
        """The residual for a run."""
        return ErrorFeedback(self.path / "residual.bin", bundle=bundle, run=run, num_parameters=num_parameters)

    def control_variate(self, *, run: bytes, num_parameters: int) -> ControlVariate:
        """The control variate for a run."""
        return ControlVariate(self.path / "control.bin", run=run, num_parameters=num_parameters)

    def personal_parameters(
        self, *, bundle: bytes, patterns: tuple[str, ...], mask: npt.NDArray[np.bool_]
    ) -> PersonalParameters:
        """The parameters that stay on this device."""
        return PersonalParameters(self.path / "personal.bin", bundle=bundle, patterns=patterns, mask=mask)

    def close(self) -> None:
        """Lets go of the lock."""
        self._lock.close()

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            raise StateError(f"{path}: cannot write: {error}") from error

"""The vectors in a run directory: parameters after rounds, what the strategy remembers, what clients see.

parameters/round-00001.safetensors   named tensors after a round
parameters.safetensors               the latest
best.safetensors                     those that were best by [stop] metric
strategy/round-00001.safetensors     what the strategy remembers after a round, if anything
public/round-00001.bin               parameters as clients see them, where the downlink compresses
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.parameters import (
    decode_parameters,
    decode_state,
    encode_parameters,
    encode_state,
)
from edgetrain.coordinator.run.records import RoundRecord
from edgetrain.coordinator.strategies import ServerState
from edgetrain.protocol.files import link_atomically, write_atomically
from edgetrain.protocol.manifest import Manifest
from edgetrain.protocol.vectors import Vector, vector_digest

# Parameters of older rounds are removed, but for the best.
KEEP_PARAMETERS = 3


class RunVectors:
    """Reads and writes them.

    Args:
        path: the run directory.
        manifest: names and shapes.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest

    def load_parameters(self, record: RoundRecord) -> Vector:
        """The parameters after a closed round.

        Raises:
            RunError: the file is missing or not what the round's record says.
        """
        path = self._parameters_path(record.round)
        try:
            vector = decode_parameters(path.read_bytes(), self._manifest)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot read the parameters of round {record.round}: {error}") from error
        if vector_digest(vector).hex() != record.parameters_sha256:
            raise RunError(f"{path}: is not what round {record.round} wrote; restore it from a copy")
        return vector

    def load_state(self, record: RoundRecord) -> ServerState:
        """What the strategy remembers from a closed round.

        Raises:
            RunError: the file is missing or not what the round's record says.
        """
        if not record.server_state_sha256:
            return {}
        path = self._state_path(record.round)
        try:
            data = path.read_bytes()
            state = decode_state(data)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot read what the strategy remembers: {error}") from error
        if hashlib.sha256(data).hexdigest() != record.server_state_sha256:
            raise RunError(f"{path}: is not what round {record.round} wrote; restore it from a copy")
        return state

    def save_parameters(self, number: int, vector: Vector) -> None:
        """Writes the parameters after a round.

        Raises:
            OSError: not writable.
        """
        write_atomically(self._parameters_path(number), encode_parameters(vector, self._manifest, number))

    def save_state(self, number: int, state: ServerState, strategy: str) -> str:
        """Writes what the strategy remembers after a round.

        Returns:
            The SHA-256 of the file in hex.

        Raises:
            OSError: not writable.
        """
        data = encode_state(state, strategy)
        self._state_path(number).parent.mkdir(exist_ok=True)
        write_atomically(self._state_path(number), data)
        return hashlib.sha256(data).hexdigest()

    def name_latest(self, number: int, best: int | None) -> None:
        """What follows when round `number` has closed; repeated at the next start, if a stop came between.

        Args:
            number: the last closed round.
            best: the best one, if that is known.

        Raises:
            OSError: not writable.
        """
        link_atomically(self._parameters_path(number), self.path / "parameters.safetensors")
        if best == number:
            link_atomically(self._parameters_path(number), self.path / "best.safetensors")

    def tidy(self, number: int, best: int | None) -> None:
        """Deletes what nobody needs after that; arguments and errors as of `name_latest`."""
        for path in (self.path / "strategy").glob("round-*.safetensors"):
            if (old := round_of(path)) is not None and old < number:
                path.unlink()
        for path in (self.path / "public").glob("round-*.bin"):
            if (old := round_of(path)) is not None and old < number:
                path.unlink()
        for path in (self.path / "parameters").glob("round-*.safetensors"):
            old = round_of(path)
            if old is not None and old <= number - KEEP_PARAMETERS and old != best:
                path.unlink()

    def keep_best(self, number: int) -> None:
        """Notes that the parameters after a round are the best, if they are still there.

        Raises:
            OSError: not writable.
        """
        path = self._parameters_path(number)
        if path.exists():
            link_atomically(path, self.path / "best.safetensors")

    def save_public(self, number: int, vector: Vector) -> None:
        """Keeps the parameters of a round as clients see them (see `downlink`).

        Raises:
            OSError: not writable.
        """
        path = self._public_path(number)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, np.ascontiguousarray(vector, dtype="<f4").data)

    def load_public(self, newest: int) -> Vector | None:
        """What `save_public` kept of a round or the last before it, if it is there and of the right length.

        Args:
            newest: the round; what was kept of a later one was never given to anybody.
        """
        kept = sorted(
            (number, path)
            for path in (self.path / "public").glob("round-*.bin")
            if (number := round_of(path)) is not None and number <= newest
        )
        path = kept[-1][1] if kept else self.path / "public.bin"
        data = path.read_bytes() if path.exists() else b""
        if len(data) != 4 * self._manifest.num_parameters:
            return None
        return np.frombuffer(data, dtype="<f4").astype(np.float32)

    def _parameters_path(self, number: int) -> Path:
        return self.path / "parameters" / f"round-{number:05d}.safetensors"

    def _public_path(self, number: int) -> Path:
        return self.path / "public" / f"round-{number:05d}.bin"

    def _state_path(self, number: int) -> Path:
        return self.path / "strategy" / f"round-{number:05d}.safetensors"


def round_of(path: Path) -> int | None:
    """The round of a file called round-NUMBER."""
    number = path.stem.removeprefix("round-")
    return int(number) if number.isdecimal() else None

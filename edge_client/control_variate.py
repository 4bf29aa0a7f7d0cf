"""The control variate of SCAFFOLD on the device (Karimireddy et al., ICML 2020, option II).

    train with gradients  g - own + server;   wanted change = (received - trained) / sum of rates - server

What the coordinator decodes of that change is what is added to `own`, when it has accepted the update; so the
coordinator's variate stays the mean of the clients', whatever the codec, and what the codec left out is part
of the next change.

The file: "EC" | version 1 | reserved 0 | length of the header, u32 | CRC-32 of all that follows, u32
| header, msgpack | vector, little-endian float32
"""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np

from edgetrain.edge_client.errors import StateError
from edgetrain.edge_client.runtimes.base import Vector
from edgetrain.edge_client.schedules import learning_rate_factor
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.training import TrainingConfig

logger = logging.getLogger(__name__)

_PREFIX = struct.Struct("<2sBBII")


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    run: bytes
    num_parameters: int
    # SHA-256 of the last update whose change is in.
    applied: bytes


class ControlVariate:
    """One client's control variate in one run, kept in a file; zeros at first.

    Args:
        path: the file; what is there is taken up if it is of the same run, else dropped.
        run: id of the run.
        num_parameters: length.
    """

    def __init__(self, path: Path, *, run: bytes, num_parameters: int) -> None:
        self._path = path
        self.run = run
        self.vector: Vector = np.zeros(num_parameters, np.float32)
        self._applied = b""
        self._load()

    def apply(self, update: bytes, change: SparseOrDense) -> None:
        """Adds an accepted change, once.

        Args:
            update: digest of the update that it came with; the same one again does nothing, so that this can
                be repeated after a crash.
            change: as the coordinator decodes it.

        Raises:
            StateError: not writable; nothing has changed.
        """
        if update == self._applied:
            return
        vector = self.vector.copy()
        change.add_to(vector)
        header = msgspec.msgpack.encode(_Header(run=self.run, num_parameters=len(vector), applied=update))
        body = header + vector.astype("<f4").tobytes()
        try:
            write_atomically(self._path, _PREFIX.pack(b"EC", 1, 0, len(header), zlib.crc32(body)) + body)
        except OSError as error:
            raise StateError(f"{self._path}: cannot store the control variate: {error}") from error
        self.vector, self._applied = vector, update

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StateError(f"{self._path}: cannot read the control variate: {error}") from error
        try:
            magic, version, _, header_bytes, crc = _PREFIX.unpack_from(data)
            body = data[_PREFIX.size :]
            if magic != b"EC" or version != 1 or zlib.crc32(body) != crc:
                raise StateError("wrong magic, version or checksum")
            header = msgspec.msgpack.decode(body[:header_bytes], type=_Header)
        except (struct.error, msgspec.DecodeError, StateError) as error:
            logger.warning("%s is damaged (%s): starting without a control variate", self._path, error)
            return
        if (header.run, header.num_parameters) != (self.run, len(self.vector)):
            logger.info("the control variate in %s is of another run: dropped", self._path)
            return
        self.vector = np.frombuffer(body[header_bytes:], dtype="<f4").astype(np.float32)
        self._applied = header.applied


def control_change(server: Vector, received: Vector, trained: Vector, training: TrainingConfig, steps: int) -> Vector:
    """By how much a client's control variate should change, float32 [num_parameters].

    With gradients `g - own + server` and no momentum, `received - trained` over the sum of the learning rates
    is `mean(g) - own + server`, so this is `mean(g) - own`.

    Args:
        server: the coordinator's control variate.
        received: parameters before the training.
        trained: and after.
        training: learning rate and schedule count.
        steps: optimizer steps done; none make no change.
    """
    rates = training.learning_rate * sum(learning_rate_factor(training.schedule, step, steps) for step in range(steps))
    if rates == 0:
        return np.zeros_like(server)
    change: Vector = (received - trained) / np.float32(rates) - server
    return change

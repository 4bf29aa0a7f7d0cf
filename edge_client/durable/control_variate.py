"""The control variate of SCAFFOLD on the device (Karimireddy et al., ICML 2020, option II).

    train with gradients  g - own + server;   wanted change = (received - trained) / sum of rates - server

What the coordinator decodes of that change is what is added to `own`, when it has accepted the update; so the
coordinator's variate stays the mean of the clients', whatever the codec, and what the codec left out is part
of the next change.

The file (`checked_file.py`, "EC"): the body is the vector, little-endian float32.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np

from edgetrain.edge_client.durable.checked_file import CheckedFile
from edgetrain.edge_client.training.schedules import learning_rate_factor
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.vectors import Vector

logger = logging.getLogger(__name__)


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
        self._file = CheckedFile(path, b"EC", "the control variate")
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
        header = _Header(run=self.run, num_parameters=len(vector), applied=update)
        self._file.write(header, vector.astype("<f4").tobytes())
        self.vector, self._applied = vector, update

    def _load(self) -> None:
        found = self._file.read(_Header)
        if found is None:
            return
        header, body = found
        if (header.run, header.num_parameters) != (self.run, len(self.vector)):
            logger.info("the control variate in %s is of another run: dropped", self._file.path)
            return
        self.vector = np.frombuffer(body, dtype="<f4").astype(np.float32)
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

"""Parameters that never leave the device: a client's own head (FedPer) or its own normalization (FedBN).

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019; Li et al., "FedBN: Federated
Learning on Non-IID Features via Local Batch Normalization", ICLR 2021. The plan names them. They start as the
coordinator's, are trained like the rest, and stay here; in what is sent they are 0.

A round's training counts once: a client that was killed after it has stored them and before its update was stored
trains that round again, and from what they were before.

The file (`checked_file.py`, "EP"): the body is the values, little-endian float32, then those before the last round, if
there were any.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.durable.checked_file import CheckedFile
from edgetrain.protocol.vectors import Vector


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    bundle: bytes
    patterns: tuple[str, ...]
    # The training that made them; an earlier edgetrain did not say.
    run: bytes = b""
    round: int = 0


class PersonalParameters:
    """The parameters of one bundle that stay on this device.

    Args:
        path: the file; values of another bundle or other groups are left alone until new ones replace them.
        bundle: digest of the bundle.
        patterns: names of the groups, as in the plan.
        mask: which elements they are, bool [num_parameters].
    """

    def __init__(self, path: Path, *, bundle: bytes, patterns: tuple[str, ...], mask: npt.NDArray[np.bool_]) -> None:
        self._file = CheckedFile(path, b"EP", "the personal parameters")
        self._header = _Header(bundle=bundle, patterns=patterns)
        self.mask = mask
        # Those of now, and those before the training that the header names.
        self._values: Vector | None = None
        self._before: Vector | None = None
        self._load()

    def overlay(self, parameters: Vector, *, training: tuple[bytes, int] | None = None) -> Vector:
        """The coordinator's parameters with this device's own in their places; a copy.

        Args:
            parameters: float32 [num_parameters].
            training: (run, round) that they will be trained in, None if they will not be: where that was done before,
                they are what they were then.
        """
        mixed = parameters.copy()
        values = self._before if self._made_in(training) else self._values
        if values is not None:
            mixed[self.mask] = values
        return mixed

    def keep(self, trained: Vector, *, training: tuple[bytes, int]) -> None:
        """Stores this device's own part of parameters that were trained in (run, round).

        Raises:
            StateError: not writable; nothing has changed.
        """
        values = trained[self.mask]
        before = self._before if self._made_in(training) else self._values
        run, number = training
        header = msgspec.structs.replace(self._header, run=run, round=number)
        parts = [values] if before is None else [values, before]
        self._file.write(header, np.concatenate(parts).astype("<f4").tobytes())
        self._header, self._values, self._before = header, values, before

    def _made_in(self, training: tuple[bytes, int] | None) -> bool:
        return training is not None and training == (self._header.run, self._header.round)

    def _load(self) -> None:
        found = self._file.read(_Header)
        if found is None:
            return
        header, body = found
        values = np.frombuffer(body, dtype="<f4").astype(np.float32)
        count = int(self.mask.sum())
        ours = (header.bundle, header.patterns) == (self._header.bundle, self._header.patterns)
        if ours and len(values) in {count, 2 * count}:
            self._header = header
            self._values, self._before = values[:count], values[count:] if len(values) > count else None

"""Parameters that never leave the device: a client's own head (FedPer) or its own normalization (FedBN).

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019; Li et al., "FedBN: Federated
Learning on Non-IID Features via Local Batch Normalization", ICLR 2021. The plan names them. They start as the
coordinator's, are trained like the rest, and stay here; in what is sent they are 0.

A round's training counts once: a client that was killed after it has stored them and before its update was stored
trains that round again, and from what they were before.

The file: "EP" | version 1 | reserved 0 | length of the header, u32 | CRC-32 of all that follows, u32
| header, msgpack | values, little-endian float32 | those before the last round, if there were any
"""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import StateError
from edgetrain.edge_client.runtimes.base import Vector
from edgetrain.protocol.files import write_atomically

logger = logging.getLogger(__name__)

_PREFIX = struct.Struct("<2sBBII")


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
        self._path = path
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
            StateError: not writable.
        """
        values = trained[self.mask]
        before = self._before if self._made_in(training) else self._values
        run, number = training
        self._header = msgspec.structs.replace(self._header, run=run, round=number)
        header = msgspec.msgpack.encode(self._header)
        body = header + values.astype("<f4").tobytes() + (b"" if before is None else before.astype("<f4").tobytes())
        try:
            write_atomically(self._path, _PREFIX.pack(b"EP", 1, 0, len(header), zlib.crc32(body)) + body)
        except OSError as error:
            raise StateError(f"{self._path}: cannot store the personal parameters: {error}") from error
        self._values, self._before = values, before

    def _made_in(self, training: tuple[bytes, int] | None) -> bool:
        return training is not None and training == (self._header.run, self._header.round)

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StateError(f"{self._path}: cannot read the personal parameters: {error}") from error
        try:
            magic, version, _, header_bytes, crc = _PREFIX.unpack_from(data)
            body = data[_PREFIX.size :]
            if magic != b"EP" or version != 1 or zlib.crc32(body) != crc:
                raise StateError("wrong magic, version or checksum")
            header = msgspec.msgpack.decode(body[:header_bytes], type=_Header)
        except (struct.error, msgspec.DecodeError, StateError) as error:
            logger.warning("%s is damaged (%s): starting from the coordinator's", self._path, error)
            return
        values = np.frombuffer(body[header_bytes:], dtype="<f4").astype(np.float32)
        count = int(self.mask.sum())
        ours = (header.bundle, header.patterns) == (self._header.bundle, self._header.patterns)
        if ours and len(values) in {count, 2 * count}:
            self._header = header
            self._values, self._before = values[:count], values[count:] if len(values) > count else None

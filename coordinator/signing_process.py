"""The process beside the coordinator's that checks and makes signatures, see `signing`.

The two speak in frames over its standard input and output: length, u32 little-endian, and msgpack. First `Identity`,
answered by `READY`; then requests, each answered in turn.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from io import FileIO
from typing import IO

import msgspec

from edgetrain.protocol import MessageError, SignatureError
from edgetrain.protocol.signing import SigningKey, seal, unseal, verify

READY = b"ready"
_LENGTH = struct.Struct("<I")


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Who signs."""

    federation: str
    sender: str
    # The private key.
    seed: bytes


class Check(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Are these envelopes signed by the owners of the public keys beside them? Answered by as many bools."""

    jobs: Sequence[tuple[bytes, bytes]]


class Seal(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Answered by the envelopes of these bodies."""

    bodies: Sequence[bytes]


class Signer:
    """Checks and makes signatures, one after the other.

    Args:
        identity: of who signs.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._key = SigningKey(identity.seed)

    def check(self, jobs: Sequence[tuple[bytes, bytes]]) -> list[bool]:
        """See `Check`."""
        return [self._is_right(*job) for job in jobs]

    def seal(self, bodies: Sequence[bytes]) -> list[bytes]:
        """See `Seal`."""
        return [seal(self._key, self._identity.federation, self._identity.sender, body) for body in bodies]

    def _is_right(self, public_key: bytes, payload: bytes) -> bool:
        try:
            verify(unseal(payload), self._identity.federation, public_key)
        except (MessageError, SignatureError):
            return False
        return True


def frame(data: bytes) -> bytes:
    """A frame of this."""
    return _LENGTH.pack(len(data)) + data


def write_frame(file: IO[bytes], data: bytes) -> None:
    """Writes a frame.

    Raises:
        OSError: nobody reads any more.
    """
    rest = memoryview(frame(data))
    while rest:
        rest = rest[file.write(rest) :]


def read_frame(file: IO[bytes]) -> bytes:
    """Reads a frame; not a byte more.

    Raises:
        EOFError: nobody writes any more.
    """
    (length,) = _LENGTH.unpack(_read(file, _LENGTH.size))
    return _read(file, length)


def _read(file: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = file.read(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def main() -> None:
    """Answers until nobody asks any more."""
    requests, answers = FileIO(os.dup(0)), FileIO(os.dup(1), "w")
    # Whatever else is printed must not get among the answers.
    os.dup2(2, 1)
    try:
        signer = Signer(msgspec.msgpack.decode(read_frame(requests), type=Identity))
        write_frame(answers, READY)
        decoder: msgspec.msgpack.Decoder[Check | Seal] = msgspec.msgpack.Decoder(Check | Seal)
        while True:
            match decoder.decode(read_frame(requests)):
                case Check(jobs):
                    write_frame(answers, msgspec.msgpack.encode(signer.check(jobs)))
                case Seal(bodies):
                    write_frame(answers, msgspec.msgpack.encode(signer.seal(bodies)))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()

"""enrolled.json: which names are enrolled with which keys, and which were revoked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.coordinator.errors import CoordinatorError
from edgetrain.protocol.files import write_atomically

REGISTRY_FILE = "enrolled.json"
_Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class AuthorityError(CoordinatorError):
    """A federation directory that is none, is damaged, or cannot do what was asked."""


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """One client."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    # Ed25519, in hex: what it signs is checked with this key.
    public_key: _Hex32
    # Of its TLS certificate, in hex.
    serial: Annotated[str, Meta(pattern="^[0-9a-f]{1,40}$")]
    # UTC, ISO 8601.
    enrolled_at: str
    revoked_at: str = ""
    # Of certificates that it had before, which are revoked.
    earlier_serials: tuple[str, ...] = ()


def read_registry(directory: Path) -> list[Enrolment]:
    """The entries of a federation directory.

    Raises:
        AuthorityError: it is none, or enrolled.json is damaged.
    """
    path = directory / REGISTRY_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise AuthorityError(f"{directory}: is no federation directory; make one with: edgetrain init DIR") from error
    except OSError as error:
        raise AuthorityError(f"{path}: {error}") from error
    return decode_registry(data, where=str(path))


def decode_registry(data: bytes, *, where: str) -> list[Enrolment]:
    """The entries of an enrolled.json.

    Raises:
        AuthorityError: damaged; `where` names the file.
    """
    try:
        return msgspec.json.decode(data, type=list[Enrolment])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AuthorityError(f"{where}: damaged: {error}") from error


def write_registry(directory: Path, entries: list[Enrolment]) -> None:
    """Replaces enrolled.json.

    Raises:
        OSError: not writable.
    """
    ordered = sorted(entries, key=lambda entry: entry.name)
    write_atomically(directory / REGISTRY_FILE, msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")

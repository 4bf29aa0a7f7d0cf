"""Ed25519 identities and signed envelopes.

An envelope is the msgpack array `[version, sender, body, signature]`. The signature covers

    "edgetrain envelope 1" NUL federation NUL sender NUL body

so a message cannot be replayed into another federation or under another name. Rounds and nonces inside
the body keep it from being replayed later.

Ed25519: RFC 8032.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from edgetrain.protocol.ed25519 import PrivateKey, is_signed
from edgetrain.protocol.errors import ConfigError, MessageError, SignatureError
from edgetrain.protocol.files import write_atomically

PROTOCOL_VERSION = 1
# Messages carry metadata only; blobs travel in chunks. A plan with every option is under 2 KiB.
MAX_MESSAGE_BYTES = 64 << 10


class VersionError(MessageError):
    """The envelope is of another protocol version; `sender` is who claims to have sent it."""

    def __init__(self, sender: str, version: int) -> None:
        super().__init__(f"{sender} speaks protocol version {version}, this edgetrain speaks {PROTOCOL_VERSION}")
        self.sender = sender
        self.version = version


class SigningKey:
    """A private key. Never printed, never logged."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._key = PrivateKey(seed)
        self.public_key = self._key.public_key

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's generator."""
        return cls(os.urandom(32))

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """The key in `path` (32 raw bytes, mode 0600), made there if it does not exist.

        Raises:
            ConfigError: the file is not a key, or cannot be read or written.
        """
        try:
            if path.exists():
                data = path.read_bytes()
                if len(data) != 32:
                    raise ConfigError(f"{path}: is not a signing key (32 bytes); restore it or move it away")
                return cls(data)
            key = cls.generate()
            key.save(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot read or create the signing key: {error}") from error
        return key

    def save(self, path: Path) -> None:
        """Writes what `load_or_create` reads.

        Raises:
            OSError: it cannot be written.
        """
        write_atomically(path, self._seed, mode=0o600)

    @classmethod
    def from_setting(cls, setting: str) -> SigningKey:
        """The key that a setting names: a file as of `load_or_create`, or 64 hex digits.

        Raises:
            ConfigError: neither.
        """
        if re.fullmatch("[0-9a-fA-F]{64}", setting):
            return cls(bytes.fromhex(setting))
        path = Path(setting)
        if not path.exists():
            # It may be a key with a digit too few: not to be shown.
            raise ConfigError("signing_key: names no file that is there, and is no key of 64 hex digits")
        return cls.load_or_create(path)

    def secret(self) -> str:
        """What `from_setting` reads: the private key itself, for a file of mode 0600 and nothing else."""
        return self._seed.hex()

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public_key.hex()[:16]}…)"


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A message body with its sender and signature."""

    version: int
    sender: str
    body: bytes
    signature: bytes


_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode


def _signed_bytes(federation: str, sender: str, body: bytes) -> bytes:
    return b"\0".join((b"edgetrain envelope 1", federation.encode(), sender.encode(), body))


def seal(key: SigningKey, federation: str, sender: str, body: bytes) -> bytes:
    """The envelope of `body`, signed, as bytes for the wire."""
    signature = key.sign(_signed_bytes(federation, sender, body))
    return msgspec.msgpack.encode(Envelope(PROTOCOL_VERSION, sender, body, signature))


def unseal(data: bytes) -> Envelope:
    """Decodes an envelope, unverified.

    Raises:
        VersionError: another protocol version.
        MessageError: not an envelope, or larger than any message.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        envelope = _decode_envelope(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _check_version(data)
        raise MessageError(f"not an edgetrain envelope: {error}") from error
    if envelope.version != PROTOCOL_VERSION:
        raise VersionError(envelope.sender[:64], envelope.version)
    return envelope


def _check_version(data: bytes) -> None:
    """Raises VersionError for an envelope of another version: only its first two fields are promised."""
    try:
        version, sender, *_ = msgspec.msgpack.decode(data, type=list)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError):
        return
    if isinstance(version, int) and isinstance(sender, str) and version != PROTOCOL_VERSION:
        raise VersionError(sender[:64], version)


def verify(envelope: Envelope, federation: str, public_key: bytes) -> None:
    """Checks that the owner of `public_key` signed this envelope.

    Raises:
        SignatureError: it did not.
    """
    if not is_signed(public_key, _signed_bytes(federation, envelope.sender, envelope.body), envelope.signature):
        raise SignatureError(f"the signature of {envelope.sender!r} is not right: forged or damaged")

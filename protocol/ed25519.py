"""Ed25519 signatures (RFC 8032): by libsodium where PyNaCl is installed, else by OpenSSL.

libsodium needs half the time, and a coordinator checks and makes one for every update. The same key and data give the
same signature in both. What libsodium accepts, OpenSSL accepts; only OpenSSL takes keys of small order and keys that
are not written in the one right way, which no signer makes.
"""

from __future__ import annotations

import functools

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

try:
    from nacl import bindings as sodium
    from nacl.exceptions import BadSignatureError
except ImportError:
    HAS_SODIUM = False
else:
    HAS_SODIUM = True

KEY_BYTES, SIGNATURE_BYTES = 32, 64


class PrivateKey:
    """What signs.

    Args:
        seed: 32 bytes.

    Raises:
        ValueError: no seed.
    """

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self._sodium_key = seed + self.public_key

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        if HAS_SODIUM:
            return bytes(sodium.crypto_sign(data, self._sodium_key)[:SIGNATURE_BYTES])
        return self._key.sign(data)


def is_signed(key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the owner of a public key signed these bytes."""
    if len(key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    if not HAS_SODIUM:
        return _is_signed_by_openssl(key, data, signature)
    try:
        sodium.crypto_sign_open(signature + data, key)
    except BadSignatureError:
        return False
    return True


def _is_signed_by_openssl(key: bytes, data: bytes, signature: bytes) -> bool:
    try:
        _public(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _public(key: bytes) -> Ed25519PublicKey:
    """The same few keys sign again and again."""
    return Ed25519PublicKey.from_public_bytes(key)

"""Key agreement, key derivation, sealed boxes.

X25519: RFC 7748. HKDF-SHA256: RFC 5869. ChaCha20-Poly1305: RFC 8439.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edgetrain.protocol.errors import SecureAggregationError

KEY_BYTES = 32
TAG_BYTES = 16
# Every box has a key of its own, used once.
_NONCE = bytes(12)


def public_key(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def agree(private: bytes, public: bytes) -> bytes:
    """The X25519 shared secret.

    Raises:
        SecureAggregationError: the public key is of small order, so that the secret would be known to all.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureAggregationError(f"a public key that gives no secret: {error}") from error


def derive(secret: bytes, session: bytes, purpose: bytes) -> bytes:
    """A 256-bit key for one purpose in one session."""
    return HKDF(SHA256(), KEY_BYTES, salt=session, info=b"edgetrain secure aggregation 1 " + purpose).derive(secret)


def mask_key(private: bytes, own: bytes, other: bytes, session: bytes) -> bytes:
    """The key of the mask that two clients share, the same for both.

    Args:
        private: of the one.
        own: its public key.
        other: the other's public key.
        session: digest of the session.
    """
    return derive(agree(private, other), session, b"mask " + min(own, other) + max(own, other))


def box_key(private: bytes, sender: bytes, receiver: bytes, session: bytes, *, sending: bool) -> bytes:
    """The key of the box that goes from one client to another; the way back has another key."""
    secret = agree(private, receiver if sending else sender)
    return derive(secret, session, b"box " + sender + receiver)


def seal_box(key: bytes, plaintext: bytes, session: bytes) -> bytes:
    """Encrypted and authenticated, `TAG_BYTES` longer. A key seals once."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, session)


def open_box(key: bytes, box: bytes, session: bytes) -> bytes | None:
    """What is in the box, or None: forged, damaged, or for somebody else."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, session)
    except InvalidTag:
        return None


def commitment(seed: bytes) -> bytes:
    """SHA-256 over a seed of 256 random bits: hides it, and shows later that it is the one."""
    return hashlib.sha256(b"edgetrain secure aggregation seed 1\0" + seed).digest()

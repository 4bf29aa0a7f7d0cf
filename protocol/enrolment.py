"""Proof that a client is enrolled: the federation's CA has signed its name and its Ed25519 key.

The CA's key is needed for enrolling only and can be offline, so whoever runs the coordinator, or has broken into it,
cannot make up clients. ECDSA with P-256 and SHA-256 (FIPS 186-5), the signature as r and s, 32 bytes each, big-endian,
as in JOSE and WebCrypto.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PROOF_BYTES = 64
_ECDSA = ec.ECDSA(hashes.SHA256())


def enrolment_statement(federation: str, name: str, public_key: bytes) -> bytes:
    """What the CA signs."""
    return b"\0".join((b"edgetrain enrolment 1", federation.encode(), name.encode(), public_key))


def prove_enrolment(key: ec.EllipticCurvePrivateKey, *, federation: str, name: str, public_key: bytes) -> bytes:
    """The proof, 64 bytes, by the CA's private key."""
    r, s = decode_dss_signature(key.sign(enrolment_statement(federation, name, public_key), _ECDSA))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def authority_key(key: ec.EllipticCurvePublicKey) -> str:
    """A CA's public key as devices have it: its compressed point in hex, 66 digits."""
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint).hex()


class Authority:
    """A federation's CA, as seen by a device.

    Args:
        key: from `authority_key`.
        federation: its name.

    Raises:
        ValueError: no such key.
    """

    def __init__(self, key: str, federation: str) -> None:
        self._key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(key))
        self._federation = federation

    def has_enrolled(self, name: str, public_key: bytes, proof: bytes) -> bool:
        """Whether a proof is right. It may have been revoked since: that is for the coordinator to refuse."""
        if len(proof) != PROOF_BYTES:
            return False
        r, s = int.from_bytes(proof[:32], "big"), int.from_bytes(proof[32:], "big")
        statement = enrolment_statement(self._federation, name, public_key)
        try:
            self._key.verify(encode_dss_signature(r, s), statement, _ECDSA)
        except InvalidSignature:
            return False
        return True

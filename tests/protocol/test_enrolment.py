"""That the CA has enrolled a client can be shown to others, and by nobody else."""

from __future__ import annotations

import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edgetrain.protocol.enrolment import PROOF_BYTES, Authority, authority_key, prove_enrolment

CA = ec.derive_private_key(12345, ec.SECP256R1())
KEY = bytes(range(32))
PROOF = prove_enrolment(CA, federation="f", name="pi", public_key=KEY)
AUTHORITY = Authority(authority_key(CA.public_key()), "f")


def test_openssl_agrees(tmp_path):
    """The statement as the documentation has it, the signature turned into OpenSSL's form."""
    (tmp_path / "statement").write_bytes(b"edgetrain enrolment 1\0f\0pi\0" + KEY)
    numbers = int.from_bytes(PROOF[:32], "big"), int.from_bytes(PROOF[32:], "big")
    (tmp_path / "signature").write_bytes(encode_dss_signature(*numbers))
    (tmp_path / "ca.pub").write_bytes(CA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    command = ["openssl", "dgst", "-sha256", "-verify", "ca.pub", "-signature", "signature", "statement"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "Verified OK\n"


def test_it_holds_for_this_federation_name_and_key_alone():
    assert len(PROOF) == PROOF_BYTES
    assert AUTHORITY.has_enrolled("pi", KEY, PROOF)
    assert not AUTHORITY.has_enrolled("pj", KEY, PROOF)
    assert not AUTHORITY.has_enrolled("pi", KEY[::-1], PROOF)
    assert not Authority(authority_key(CA.public_key()), "g").has_enrolled("pi", KEY, PROOF)
    other = ec.generate_private_key(ec.SECP256R1())
    assert not Authority(authority_key(other.public_key()), "f").has_enrolled("pi", KEY, PROOF)
    # No name can be read as another with a part of a key.
    assert not AUTHORITY.has_enrolled("pi\0" + "a", KEY[1:], PROOF)


@pytest.mark.parametrize(
    "proof",
    [b"", PROOF[:-1], PROOF + b"\0", bytes(64), b"\xff" * 64, PROOF[32:] + PROOF[:32]],
    ids=["nothing", "cut short", "too long", "zeros", "ones", "halves exchanged"],
)
def test_what_is_no_proof(proof):
    assert not AUTHORITY.has_enrolled("pi", KEY, proof)


def test_every_bit_of_a_proof_counts():
    for bit in range(8 * PROOF_BYTES):
        changed = bytearray(PROOF)
        changed[bit // 8] ^= 1 << bit % 8
        assert not AUTHORITY.has_enrolled("pi", KEY, bytes(changed)), bit


@pytest.mark.parametrize("key", ["", "02" + "00" * 31, "02" + "ff" * 32, "zz", "04" + "11" * 32])
def test_what_is_no_key_of_a_ca(key):
    with pytest.raises(ValueError, match=".+"):
        Authority(key, "f")

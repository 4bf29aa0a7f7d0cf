"""Signatures, by both libraries that make them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol import ed25519
from edgetrain.protocol.ed25519 import PrivateKey, is_signed

# RFC 8032, section 7.1, tests 1 to 3: seed, public key, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
            "655141438e7a100b"
        ),
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
            "b00d291612bb0c00"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28d"
            "c027beceea1ec40a"
        ),
    ),
]
SODIUM = pytest.param(True, id="libsodium", marks=pytest.mark.skipif(not ed25519.HAS_SODIUM, reason="no PyNaCl"))


@pytest.fixture(params=[SODIUM, pytest.param(False, id="openssl")])
def library(request, monkeypatch):
    monkeypatch.setattr(ed25519, "HAS_SODIUM", request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("vector", VECTORS)
def test_vectors_of_rfc_8032(vector):
    seed, public, message, signature = map(bytes.fromhex, vector)
    key = PrivateKey(seed)
    assert (key.public_key, key.sign(message)) == (public, signature)
    assert is_signed(public, message, signature)


@pytest.mark.usefixtures("library")
def test_nothing_else_is_signed():
    _, public, message, signature = map(bytes.fromhex, VECTORS[2])
    for position in range(8 * len(signature)):
        changed = bytearray(signature)
        changed[position // 8] ^= 1 << position % 8
        assert not is_signed(public, message, bytes(changed))
    assert not is_signed(public, message + b"\0", signature)
    assert not is_signed(bytes.fromhex(VECTORS[0][1]), message, signature)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_other_lengths_are_no_keys_and_no_signatures(size):
    _, public, message, signature = map(bytes.fromhex, VECTORS[2])
    assert not is_signed(bytes(size), message, signature)
    assert not is_signed(public, message, bytes(size))
    assert not is_signed(public, message, signature + bytes(size or 1))
    with pytest.raises(ValueError, match="32"):
        PrivateKey(bytes(size))


@pytest.mark.usefixtures("library")
def test_a_key_that_is_no_point_has_signed_nothing():
    # y = 2 is on no point of the curve.
    assert not is_signed((2).to_bytes(32, "little"), b"x", bytes(64))


@pytest.mark.skipif(not ed25519.HAS_SODIUM, reason="no PyNaCl")
@given(seed=st.binary(min_size=32, max_size=32), data=st.binary(max_size=300))
def test_both_libraries_sign_alike_and_take_each_others_signatures(seed, data):
    key, signatures = PrivateKey(seed), []
    for sodium in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ed25519, "HAS_SODIUM", sodium)
            signatures.append(key.sign(data))
            assert is_signed(key.public_key, data, signatures[0])
            assert not is_signed(key.public_key, data + b"x", signatures[0])
    assert signatures[0] == signatures[1]


def test_without_pynacl_openssl_signs():
    """In a process of its own, where nothing named nacl can be imported."""
    seed, public, message, signature = VECTORS[1]
    code = (
        "import sys; sys.modules['nacl'] = None\n"
        "from edgetrain.protocol.ed25519 import HAS_SODIUM, PrivateKey, is_signed\n"
        f"key, message = PrivateKey(bytes.fromhex('{seed}')), bytes.fromhex('{message}')\n"
        "print(HAS_SODIUM, key.sign(message).hex(), is_signed(key.public_key, message, key.sign(message)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", signature, "True"]
    assert public

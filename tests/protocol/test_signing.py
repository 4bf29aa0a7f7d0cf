"""Envelopes: only what the right key signed, for this federation, under this name, in this version."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.errors import ConfigError, MessageError, SignatureError
from edgetrain.protocol.messages import Decline, encode_message
from edgetrain.protocol.signing import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    SigningKey,
    VersionError,
    seal,
    unseal,
    verify,
)

KEY = SigningKey(bytes(range(32)))
OTHER = SigningKey(bytes(32))


def test_a_sealed_message_opens_with_its_key():
    envelope = unseal(seal(KEY, "f", "c", b"body"))
    verify(envelope, "f", KEY.public_key)
    assert (envelope.version, envelope.sender, envelope.body) == (PROTOCOL_VERSION, "c", b"body")


def test_vector_of_rfc_8032():
    """Section 7.1, test 1: the empty message."""
    key = SigningKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e0652249")


def test_the_signed_bytes_are_as_documented():
    envelope = unseal(seal(KEY, "f", "c", b"body"))
    assert envelope.signature == KEY.sign(b"edgetrain envelope 1\0f\0c\0body")


def test_the_vector_in_the_documentation():
    text = (Path(__file__).parent.parent.parent / "docs/protocol.md").read_text()
    found = dict(
        re.findall(r"^    (body|public key|signature|envelope) +([0-9a-f]+(?:\n +[0-9a-f]+)*)$", text, re.MULTILINE)
    )
    vector = {name: bytes.fromhex(re.sub(r"\s", "", value)) for name, value in found.items()}
    key = SigningKey(b"k" * 32)
    body = encode_message(Decline(round=7, nonce=b"\1" * 16, reason="no"))
    assert vector["body"] == body
    assert vector["public key"] == key.public_key
    assert vector["envelope"] == seal(key, "f", "pi", body)
    assert vector["signature"] == key.sign(b"edgetrain envelope 1\0f\0pi\0" + body)


@pytest.mark.parametrize(("federation", "key"), [("g", KEY), ("f", OTHER)], ids=["another federation", "another key"])
def test_a_signature_is_of_one_federation_and_one_key(federation, key):
    envelope = unseal(seal(KEY, "f", "c", b"body"))
    with pytest.raises(SignatureError, match="'c'"):
        verify(envelope, federation, key.public_key)


@pytest.mark.parametrize("change", [{"sender": "d"}, {"body": b"bodY"}, {"signature": bytes(64)}, {"signature": b""}])
def test_a_changed_envelope_does_not_verify(change):
    envelope = msgspec.structs.replace(unseal(seal(KEY, "f", "c", b"body")), **change)
    with pytest.raises(SignatureError):
        verify(envelope, "f", KEY.public_key)


@pytest.mark.parametrize("key", [b"", b"short", bytes(32), b"\xff" * 32, b"x" * 33])
def test_a_useless_public_key_verifies_nothing(key):
    with pytest.raises(SignatureError):
        verify(unseal(seal(KEY, "f", "c", b"body")), "f", key)


@pytest.mark.parametrize("version", [0, 2, 999])
def test_another_version_is_told_apart_even_if_the_rest_is_unknown(version):
    later = msgspec.msgpack.encode([version, "c", {"laid out": "otherwise"}])
    with pytest.raises(VersionError, match=f"c speaks protocol version {version}.*speaks {PROTOCOL_VERSION}") as caught:
        unseal(later)
    assert (caught.value.sender, caught.value.version) == ("c", version)


def test_a_message_beyond_the_limit_is_refused_before_it_is_decoded():
    with pytest.raises(MessageError, match="exceeds the limit"):
        unseal(bytes(MAX_MESSAGE_BYTES + 1))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_message_errors_only(data):
    with pytest.raises(MessageError):
        unseal(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(values)
def test_arbitrary_msgpack_raises_message_errors_or_does_not_verify(value):
    try:
        envelope = unseal(msgspec.msgpack.encode(value))
    except MessageError:
        return
    with pytest.raises(SignatureError):
        verify(envelope, "f", KEY.public_key)


def test_deep_msgpack_is_a_message_error():
    with pytest.raises(MessageError):
        unseal(b"\x91" * (MAX_MESSAGE_BYTES - 1))


@given(st.integers(0, 200), st.integers(1, 255))
def test_any_damaged_byte_is_noticed(position, flip):
    data = bytearray(seal(KEY, "f", "client", b"some body of a message"))
    data[position % len(data)] ^= flip
    with pytest.raises(MessageError):  # SignatureError and VersionError are such
        verify(unseal(bytes(data)), "f", KEY.public_key)


# --- key files ---------------------------------------------------------------------------------------


def test_a_key_is_made_once_and_is_nobody_elses_to_read(tmp_path):
    path = tmp_path / "key"
    first = SigningKey.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32
    assert SigningKey.load_or_create(path).public_key == first.public_key
    assert SigningKey.load_or_create(tmp_path / "other").public_key != first.public_key


@pytest.mark.parametrize("contents", [b"", b"short", b"x" * 33])
def test_a_damaged_key_file_is_an_error_and_left_as_it_is(tmp_path, contents):
    (tmp_path / "key").write_bytes(contents)
    with pytest.raises(ConfigError, match="not a signing key"):
        SigningKey.load_or_create(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == contents


def test_a_key_that_cannot_be_stored_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read or create"):
        SigningKey.load_or_create(tmp_path / "no such directory" / "key")


def test_the_private_key_is_not_printed():
    for seed in (bytes(range(32)), b"s" * 32):
        key = SigningKey(seed)
        assert seed.hex()[:16] not in repr(key)
        assert repr(seed) not in repr(key)

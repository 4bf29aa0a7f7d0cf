"""The client's own directory."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.errors import StateError
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.manifest import FileEntry

ONE, TWO = bytes(range(32)), bytes(reversed(range(32)))


@pytest.fixture
def state(tmp_path):
    state = ClientState(tmp_path / "state")
    yield state
    state.close()


def test_it_keeps_its_key(tmp_path):
    keys = []
    for _ in range(2):
        state = ClientState(tmp_path / "deep" / "state")
        keys.append(state.key.public_key)
        state.close()
    assert keys[0] == keys[1]
    assert stat.S_IMODE((tmp_path / "deep/state/identity.key").stat().st_mode) == 0o600


def test_two_clients_cannot_share_it(state, tmp_path):
    with pytest.raises(StateError, match="another client runs"):
        ClientState(tmp_path / "state")
    state.close()
    ClientState(tmp_path / "state").close()


@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/nothing"])
def test_where_nothing_can_be_written_is_an_error(path):
    with pytest.raises(StateError, match="cannot use the state directory"):
        ClientState(Path(path))


def test_a_damaged_key_is_an_error_and_lets_go_of_the_lock(tmp_path):
    ClientState(tmp_path).close()
    key = (tmp_path / "identity.key").read_bytes()
    (tmp_path / "identity.key").write_bytes(key[:-1])
    with pytest.raises(ConfigError, match=r"identity\.key"):
        ClientState(tmp_path)
    (tmp_path / "identity.key").write_bytes(key)
    ClientState(tmp_path).close()


def test_the_first_coordinator_is_trusted_and_remembered(state):
    assert state.trusted_coordinator() is None
    state.pin_coordinator(ONE)
    assert state.trusted_coordinator() == ONE


@pytest.mark.parametrize("configured", [ONE.hex(), ONE.hex().upper(), f" {ONE.hex()}\n"])
def test_the_configured_key_counts_more_than_the_remembered_one(state, configured):
    state.pin_coordinator(TWO)
    assert state.trusted_coordinator(configured) == ONE


@pytest.mark.parametrize("configured", ["not hex", ONE.hex()[:-1], "00" * 33])
def test_what_is_configured_has_to_be_a_key(state, configured):
    with pytest.raises(ConfigError, match="coordinator_key"):
        state.trusted_coordinator(configured)


@pytest.mark.parametrize("contents", [b"\xff\xfe", b"not hex\n", b"00" * 31])
def test_a_damaged_pin_trusts_nobody(state, contents):
    (state.path / "coordinator.pub").write_bytes(contents)
    with pytest.raises(StateError, match="remove"):
        state.trusted_coordinator()


def test_an_unreadable_pin_is_an_error(state):
    (state.path / "coordinator.pub").mkdir()
    with pytest.raises(StateError, match=r"coordinator\.pub"):
        state.trusted_coordinator()


def test_files_of_a_bundle(state):
    data, digest = b"graph", b"d" * 32
    entry = FileEntry(file="onnxruntime/step.onnx", sha256=hashlib.sha256(data).hexdigest(), size=5)
    assert not state.has_file(digest, entry)
    state.store_file(digest, entry.file, data)
    assert state.has_file(digest, entry)
    (state.bundle_directory(digest) / entry.file).write_bytes(b"grapH")
    assert not state.has_file(digest, entry)


def test_a_manifest_counts_only_if_it_is_the_right_one(state):
    data = b"{}"
    digest = hashlib.sha256(data).digest()
    assert state.read_manifest(digest) is None
    state.store_file(digest, "manifest.json", data)
    assert state.read_manifest(digest) == data
    state.store_file(digest, "manifest.json", b"{ }")
    assert state.read_manifest(digest) is None


def test_a_full_disk_is_an_error_and_leaves_no_part(state, monkeypatch):
    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StateError, match="No space left"):
        state.store_file(b"d" * 32, "step.onnx", b"graph")
    monkeypatch.undo()
    assert list(state.bundle_directory(b"d" * 32).iterdir()) == []
    (state.path / "bundles2").write_text("")
    monkeypatch.setattr(state, "path", state.path / "bundles2")
    with pytest.raises(StateError):
        state.store_file(b"d" * 32, "step.onnx", b"graph")

"""Files are whole or not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edgetrain.protocol.files import begin_writing, write_atomically


def test_it_writes_and_replaces(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, b"one")
    write_atomically(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["f"]


def test_the_mode_is_the_one_asked_for(tmp_path):
    write_atomically(tmp_path / "secret", b"", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, failing):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    data = b"new" if failing != "write" else 3.5
    with pytest.raises((OSError, TypeError)):
        write_atomically(path, data)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    with pytest.raises(OSError):
        write_atomically(Path("/dev/full/x"), b"data")


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_secret_is_never_in_a_file_that_somebody_else_prepared(tmp_path):
    """A temporary of the name that we would use, readable by all, or a link to one."""
    trap = tmp_path / f".key.{os.getpid()}.tmp"
    target = tmp_path / "of-somebody-else"
    for prepare in (lambda: trap.touch(mode=0o666), lambda: trap.symlink_to(target)):
        target.write_bytes(b"")
        prepare()
        write_atomically(tmp_path / "key", b"secret", mode=0o600)
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
        assert not (tmp_path / "key").is_symlink()
        assert target.read_bytes() == b""


def test_what_the_disk_has_begun_with_stays_what_it_is(tmp_path):
    data = os.urandom(3 << 20)
    with (tmp_path / "f").open("wb", buffering=0) as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
            begin_writing(file.fileno(), start, start + (1 << 20))
    assert (tmp_path / "f").read_bytes() == data
    reader, writer = os.pipe()
    # A pipe has no disk.
    begin_writing(writer, 0, 10)
    os.close(reader)
    os.close(writer)

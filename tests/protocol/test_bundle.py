"""Bundles on disk: read with suspicion, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetrain.protocol import bundle as bundle_module
from edgetrain.protocol.bundle import Bundle, write_bundle
from edgetrain.protocol.errors import BundleError
from support.tiny_bundle import initial_parameters, write_tiny_bundle


@pytest.fixture(params=["tiny", "tiny.edge"], ids=["directory", "archive"])
def path(request, tmp_path):
    return write_tiny_bundle(tmp_path / request.param)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("archive") / "tiny.edge")


def files_of(bundle):
    return {entry.file: bundle.read(entry) for entry in bundle.manifest.files()}


def test_directory_and_archive_hold_the_same(tmp_path):
    one, two = (Bundle(write_tiny_bundle(tmp_path / name)) for name in ("a", "a.edge"))
    assert one.digest == two.digest == hashlib.sha256(one.manifest_bytes).digest()
    assert files_of(one) == files_of(two)
    np.testing.assert_array_equal(one.initial_parameters(), initial_parameters())


def test_initial_parameters_are_a_fresh_copy(path):
    bundle = Bundle(path)
    first = bundle.initial_parameters()
    first[:] = 7
    assert not (bundle.initial_parameters() == 7).any()


def test_the_same_bundle_is_the_same_bytes(tmp_path):
    one, two = (write_tiny_bundle(tmp_path / name).read_bytes() for name in ("a.edge", "b.edge"))
    assert one == two


def test_every_file_is_checked(tiny_bundle, tmp_path):
    for entry in Bundle(tiny_bundle).manifest.files():
        path = shutil.copytree(tiny_bundle, tmp_path / entry.file.replace("/", "-"))
        data = bytearray((path / entry.file).read_bytes())
        data[len(data) // 2] ^= 1
        (path / entry.file).write_bytes(data)
        with pytest.raises(BundleError, match=f"{entry.file} is corrupt"):
            Bundle(path).verify_files()
        (path / entry.file).write_bytes(data[:-1])
        with pytest.raises(BundleError, match=f"{entry.file} is corrupt"):
            Bundle(path).verify_files()
        (path / entry.file).unlink()
        with pytest.raises(BundleError, match=f"{entry.file} is missing"):
            Bundle(path).verify_files()


def test_a_file_larger_than_declared_is_corrupt_and_not_read_whole(tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "b")
    with (path / "parameters.bin").open("ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BundleError, match=r"parameters\.bin is corrupt"):
        Bundle(path).initial_parameters()


def test_nothing_there_says_how_to_make_one(tmp_path):
    with pytest.raises(BundleError, match=r"no such bundle.*edgetrain export"):
        Bundle(tmp_path / "none")


def test_a_directory_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        Bundle(tmp_path)


def test_a_file_that_is_no_archive_is_no_bundle(tmp_path):
    (tmp_path / "x.edge").write_bytes(b"hello")
    with pytest.raises(BundleError, match="not a bundle directory and not an .edge archive"):
        Bundle(tmp_path / "x.edge")


def test_a_symlink_out_of_the_bundle_is_refused(tiny_bundle, tmp_path):
    path = shutil.copytree(tiny_bundle, tmp_path / "b")
    secret = tmp_path / "secret"
    shutil.move(path / "parameters.bin", secret)
    (path / "parameters.bin").symlink_to(secret)
    with pytest.raises(BundleError, match="points outside the bundle"):
        Bundle(path).initial_parameters()


def test_every_truncation_of_an_archive_is_a_bundle_error(archive, tmp_path):
    data = archive.read_bytes()
    path = tmp_path / "t.edge"
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(BundleError):
            Bundle(path).verify_files()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_is_a_bundle_error_or_whole(archive, tmp_path, data):
    """Flipped bits in the zip's structures must not come out as anything but `BundleError`."""
    original = archive.read_bytes()
    # The structures are at the end, and before each member.
    position = data.draw(
        st.one_of(
            st.integers(0, len(original) - 1),
            st.integers(len(original) - 600, len(original) - 1),
            st.sampled_from([m.header_offset for m in zipfile.ZipFile(archive).infolist()]).flatmap(
                lambda offset: st.integers(offset, offset + 60)
            ),
        )
    )
    damaged = bytearray(original)
    damaged[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "d.edge"
    path.write_bytes(damaged)
    try:
        bundle = Bundle(path)
        found = files_of(bundle)
    except BundleError:
        return
    whole = Bundle(archive)
    assert bundle.digest == whole.digest
    assert found == files_of(whole)


def test_a_compressed_member_that_unpacks_to_more_is_refused(archive, tmp_path):
    path = tmp_path / "bomb.edge"
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in whole.infolist():
            data = whole.read(info)
            bomb.writestr(info.filename, data + bytes(50_000_000) if info.filename == "parameters.bin" else data)
    with pytest.raises(BundleError, match="corrupt"):
        Bundle(path).initial_parameters()


# --- writing -----------------------------------------------------------------------------------------


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_older_bundle_is_replaced_whole(path):
    bundle = Bundle(path)
    files = files_of(bundle)
    if path.is_dir():
        (path / "onnxruntime" / "stale.onnx").write_bytes(b"left over")
    assert write_bundle(path, bundle.manifest, files) == path
    again = Bundle(path)
    again.verify_files()
    assert again.digest == bundle.digest
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary is left"
    if path.is_dir():
        assert len(contents(path)) == 1 + len(files)


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_directory_of_something_else_is_left_alone(tiny_bundle, tmp_path, name):
    bundle = Bundle(tiny_bundle)
    out = tmp_path / "precious"
    out.mkdir()
    (out / name).write_text('{"name": "a browser extension"}')
    before = contents(out)
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(out, bundle.manifest, files_of(bundle))
    assert contents(out) == before


def test_a_file_is_not_replaced_by_a_directory_nor_the_reverse(tiny_bundle, tmp_path):
    bundle = Bundle(tiny_bundle)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "d.edge").mkdir()
    for name in ("file", "d.edge"):
        with pytest.raises(BundleError, match=name):
            write_bundle(tmp_path / name, bundle.manifest, files_of(bundle))
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "d.edge").is_dir()


def test_an_archive_does_not_replace_a_file_of_something_else(tiny_bundle, tmp_path):
    bundle = Bundle(tiny_bundle)
    (tmp_path / "x.edge").write_text("precious")
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(tmp_path / "x.edge", bundle.manifest, files_of(bundle))
    assert (tmp_path / "x.edge").read_text() == "precious"


@pytest.mark.parametrize("out", ["/", "..", "/dev/null/x", "/dev/null/x.edge", "/proc/nothing/x.edge", "/proc/x"])
def test_where_nothing_can_be_written_is_a_bundle_error(tiny_bundle, out):
    bundle = Bundle(tiny_bundle)
    with pytest.raises(BundleError):
        write_bundle(out, bundle.manifest, files_of(bundle))


def test_the_current_directory_can_be_the_bundle(tiny_bundle, tmp_path, monkeypatch):
    bundle = Bundle(tiny_bundle)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BundleError, match="name"):
        write_bundle(".", bundle.manifest, files_of(bundle))


@pytest.mark.parametrize("name", ["b", "b.edge"])
@pytest.mark.parametrize("fail_at", [1, 3, 7, 8, 9])
def test_a_failure_on_the_way_leaves_the_old_bundle(tmp_path, monkeypatch, name, fail_at):
    """Whichever rename fails: the old bundle is still there, whole, and nothing else."""
    out = write_tiny_bundle(tmp_path / name)
    old = Bundle(out)
    files, manifest = files_of(old), old.manifest
    calls = []

    def failing(operation):
        def call(self, target):
            calls.append(self)
            if len(calls) == fail_at:
                raise OSError(28, os.strerror(28))
            return operation(self, target)

        return call

    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    for _ in range(3):  # some succeed before the failing call
        if len(calls) >= fail_at:
            break
        try:
            write_bundle(out, manifest, files)
        except BundleError as error:
            assert "No space left" in str(error)
    monkeypatch.undo()
    again = Bundle(out)
    again.verify_files()
    assert again.digest == old.digest
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_remains_of_a_killed_writer_with_the_same_id_do_no_harm(tiny_bundle, tmp_path):
    bundle = Bundle(tiny_bundle)
    for kind in ("tmp", "old"):
        remains = tmp_path / f".b.{os.getpid()}.{kind}"
        remains.mkdir()
        (remains / "junk").write_text("from a process that was killed")
    out = write_bundle(tmp_path / "b", bundle.manifest, files_of(bundle))
    assert Path("junk") not in contents(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_files_and_manifest_must_agree(tiny_bundle, tmp_path):
    bundle = Bundle(tiny_bundle)
    files = files_of(bundle)
    files.pop("parameters.bin")
    with pytest.raises(AssertionError):
        write_bundle(tmp_path / "b", bundle.manifest, files)
    assert not (tmp_path / "b").exists()


def test_limit_of_the_manifest(tmp_path, monkeypatch):
    path = write_tiny_bundle(tmp_path / "b")
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(BundleError):
        Bundle(path)
    assert json.loads((path / "manifest.json").read_bytes())

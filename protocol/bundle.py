"""Reading and writing bundles: a directory, or the same as one uncompressed zip (`.edge`).

Readers trust nothing: every file is checked against the manifest's SHA-256 and size before it is used.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgetrain.protocol.errors import BundleError
from edgetrain.protocol.files import sync_directory, write_atomically
from edgetrain.protocol.int8 import decode_parameters
from edgetrain.protocol.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
    peek_version,
)

ARCHIVE_SUFFIX = ".edge"
# A manifest names each parameter once; 16 MiB is two orders of magnitude above the largest we write.
MAX_MANIFEST_BYTES = 16 << 20
# Whatever zipfile and the decompressors raise on damaged or hostile bytes.
_ZIP_ERRORS = (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)


class Bundle:
    """An opened bundle.

    Args:
        path: a bundle directory or an `.edge` archive.

    Raises:
        BundleError: nothing there, or not a bundle, or a version that this reader does not know.
    """

    manifest: Manifest
    # manifest.json as it stands.
    manifest_bytes: bytes
    # SHA-256 of manifest.json: names the whole bundle, since the manifest names every file by hash.
    digest: bytes

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._archive = _open_archive(self.path)
        data = _read(self.path, self._archive, MANIFEST_FILE, MAX_MANIFEST_BYTES)
        try:
            self.manifest = decode_manifest(data)
        except BundleError as error:
            raise BundleError(f"{self.path}: {error}") from error
        self.manifest_bytes = data
        self.digest = hashlib.sha256(data).digest()

    def read(self, entry: FileEntry) -> bytes:
        """The contents of one file, verified.

        Raises:
            BundleError: missing, or its size or hash differ from the manifest.
        """
        data = _read(self.path, self._archive, entry.file, entry.size)
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _corrupt(self.path, entry)
        return data

    def map(self, entry: FileEntry) -> memoryview:
        """The contents of one file, verified; of a directory mapped into memory, not copied.

        For large files that are read once: their pages are the system's to drop and to read again.

        Raises:
            BundleError: missing, or its size or hash differ from the manifest.
        """
        if self._archive is not None or entry.size == 0:
            return memoryview(self.read(entry))
        with _guarded(self.path, entry.file):
            with _inside(self.path, entry.file).open("rb") as file:
                if os.fstat(file.fileno()).st_size != entry.size:
                    raise _corrupt(self.path, entry)
                mapped = mmap.mmap(file.fileno(), entry.size, access=mmap.ACCESS_READ)
            data = memoryview(mapped)
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise _corrupt(self.path, entry)
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
        return data

    def initial_parameters(self) -> np.ndarray:
        """The flat float32 vector to start from, a fresh writable copy."""
        return decode_parameters(self.read(self.manifest.initial_parameters), self.manifest.parameters)

    def verify_files(self, runtime: str | None = None) -> None:
        """Checks every file of one runtime, or of all.

        Raises:
            BundleError: the first file that is missing or corrupt.
        """
        for entry in self.manifest.files(runtime):
            self.read(entry)


def _open_archive(path: Path) -> zipfile.ZipFile | None:
    """The archive; None for a directory."""
    if path.is_dir():
        return None
    if not path.is_file():
        raise BundleError(f"{path}: no such bundle. `edgetrain export MODEL -o {path}` writes one.")
    try:
        return zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise BundleError(f"{path}: not a bundle directory and not an {ARCHIVE_SUFFIX} archive: {error}") from error


def _read(path: Path, archive: zipfile.ZipFile | None, name: str, limit: int) -> bytes:
    """At most `limit` + 1 bytes, so that a file larger than declared costs nothing."""
    with _guarded(path, name):
        if archive is None:
            with _inside(path, name).open("rb") as file:
                return file.read(limit + 1)
        with archive.open(name) as member:
            return member.read(limit + 1)


def _inside(path: Path, name: str) -> Path:
    file = path / name
    if not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{path}: {name} points outside the bundle")
    return file


@contextmanager
def _guarded(path: Path, name: str) -> Iterator[None]:
    """What goes wrong while a file is read, as a BundleError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, KeyError, IsADirectoryError) as error:
        raise BundleError(f"{path}: {name} is missing: not a bundle, or not a whole one") from error
    except _ZIP_ERRORS as error:
        raise BundleError(f"{path}: {name} cannot be read: {error or type(error).__name__}") from error


def _corrupt(path: Path, entry: FileEntry) -> BundleError:
    return BundleError(
        f"{path}: {entry.file} is corrupt: its size or SHA-256 is not the manifest's. Copy or export the bundle again."
    )


def _is_bundle(path: Path) -> bool:
    """Whether a bundle of any version is there, damaged or not."""
    try:
        peek_version(_read(path, _open_archive(path), MANIFEST_FILE, MAX_MANIFEST_BYTES))
    except BundleError:
        return False
    return True


def file_entry(name: str, data: bytes) -> FileEntry:
    """The manifest entry of a file with these contents."""
    return FileEntry(file=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def check_target(out: str | os.PathLike[str]) -> None:
    """Whether a bundle can be written there: to be asked before the work of making one.

    Args:
        out: as of `write_bundle`.

    Raises:
        BundleError: `out` exists and is no bundle, or its directory cannot be written to.
    """
    out = Path(out)
    if out.name in {"", ".."}:
        raise BundleError(f"{out}: has no name of its own; choose a name for the bundle")
    if out.suffix == ARCHIVE_SUFFIX and out.is_dir():
        raise BundleError(f"{out}: is a directory; choose another name for the archive")
    if out.exists() and not _is_bundle(out) and not (out.is_dir() and not any(out.iterdir())):
        raise BundleError(f"{out}: exists and is not a bundle; choose another -o or remove it")
    parent = next(path for path in out.absolute().parents if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise BundleError(f"{out}: cannot write to {parent}: {error.strerror}; choose another -o") from error


def write_bundle(out: str | os.PathLike[str], manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Writes a bundle atomically: `out` is whole or not there.

    Args:
        out: target directory, or an archive if it ends in `.edge`. An older bundle there is replaced;
            a directory that holds anything else is left alone.
        manifest: names exactly `files`.
        files: contents by path relative to the bundle.

    Raises:
        BundleError: `out` exists and is no bundle, or cannot be written.
    """
    out = Path(out)
    check_target(out)
    contents = {MANIFEST_FILE: encode_manifest(manifest), **files}
    assert set(files) == {entry.file for entry in manifest.files()}, "the manifest names exactly these files"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ARCHIVE_SUFFIX:
            _write_archive(out, contents)
        else:
            _write_directory(out, contents)
    except OSError as error:
        raise BundleError(f"{out}: cannot write the bundle: {error}") from error
    return out


def _write_archive(out: Path, contents: Mapping[str, bytes]) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, data in contents.items():
                    # A fixed date: the same bundle gives the same bytes.
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(out.parent)


def _write_directory(out: Path, contents: Mapping[str, bytes]) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    # Remains of a killed process that had our id.
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        for name, data in contents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(temporary / name, data)
        replaces = out.exists()
        if replaces:
            out.rename(old)
        try:
            temporary.rename(out)
        except BaseException:
            if replaces:
                old.rename(out)
            raise
        sync_directory(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

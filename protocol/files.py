"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes | memoryview, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replaces `path` with `data`: a reader, or a reboot, sees the old contents or the new, never a part.

    Args:
        path: the file.
        data: its contents.
        mode: its permissions.
        durable: wait for the disk; without it, a power cut may leave less than either.

    Raises:
        OSError: disk full, read-only, no permission; the old file is untouched and no temporary is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Made by us: in a directory that others can write to, a file of that name could be theirs, and readable.
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def link_atomically(source: Path, path: Path) -> None:
    """Makes `path` another name of `source`, a file that is never changed in place; a copy where that is impossible.

    Does not wait for the disk.

    Raises:
        OSError: disk full, read-only, no permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        # A rename between two names of one file does nothing, and leaves both.
        temporary.replace(path)
    except OSError:
        write_atomically(path, source.read_bytes(), durable=False)
    finally:
        temporary.unlink(missing_ok=True)


def begin_writing(descriptor: int, start: int, stop: int) -> None:
    """Lets the disk begin with bytes of an open file, so that a later fsync has less to wait for.

    Where the system has no way to say so, or the disk does not take it, nothing happens: the fsync will tell.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            # Linux writes what it is told that nobody will read.
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def sync_directory(path: Path) -> None:
    """Makes renames and new files in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

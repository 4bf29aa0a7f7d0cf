"""Memory that this process no longer needs, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

# Of glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
# Of Linux's mman.h.
_MADV_DONTNEED = 4
# A private mapping of a file that cannot be written to: from, to, and kB that are no longer the file's.
_READ_ONLY = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) r-[x-]p \S+ \S+ [1-9]\d* +/.*\n(?:[A-Z].*\n)*?Anonymous: +(\d+) kB\n"
    rb"(?:[A-Z].*\n)*?Swap: +(\d+) kB\n",
    re.MULTILINE,
)
# Blocks of at least so many bytes go back to the system when they are freed.
_LARGE = 1 << 20


def return_what_is_freed() -> None:
    """Has the C library keep little for later: for processes that load and drop programs. Call it before any thread."""
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)
        set_option(_M_ARENA_MAX, 1)


def trim() -> None:
    """Returns free pages, which the C library would keep for later."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is another one."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
    return function


def give_back_memory() -> None:
    """Collects garbage, and returns what is free and what files hold."""
    gc.collect()
    trim()
    forget_code()


def forget_code() -> None:
    """Unmaps pages of programs and libraries; those that are needed come back from the file.

    Most of them were read once: to import modules, to load and optimize a graph. Only mappings that cannot be written
    to and hold nothing but the file's own pages (no relocated addresses) are taken.
    """
    try:
        advise = ctypes.CDLL(None).madvise
        smaps = Path("/proc/self/smaps").read_bytes()
    except (AttributeError, OSError):
        return  # no Linux
    for start, end in only_of_files(smaps):
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def only_of_files(smaps: bytes) -> list[tuple[int, int]]:
    """Where mappings are whose every page can be read again from the file, in /proc/self/smaps."""
    return [
        (int(start, 16), int(end, 16))
        for start, end, changed, swapped in _READ_ONLY.findall(smaps)
        if int(changed) == int(swapped) == 0
    ]


class MappedRows(np.memmap):
    """A memory-mapped array whose rows are read, not mapped: what a process reads by mapping counts as its memory."""

    # Of the file, if this is the whole array: views of it are ordinary ones.
    descriptor: int | None = None

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.generic]:
        """The samples at `indices`, copied."""
        part = np.empty((len(indices), *self.shape[1:]), self.dtype)
        if self.descriptor is None:
            part[...] = self[indices]
            return part
        size = self.nbytes // max(1, len(self))
        # Rows that follow one another are one piece of the file.
        starts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), len(indices)]
        for first, last in pairwise(starts if len(indices) else []):
            where = self.offset + int(indices[first]) * size
            # A file that was cut short gives fewer bytes: a mapping would end the process there.
            if os.preadv(self.descriptor, [part[first:last].data], where) != (last - first) * size:
                raise OSError(f"{self.filename}: is shorter than it was")
        return part


def map_rows(
    path: Path, dtype: npt.DTypeLike, offset: int, shape: tuple[int, ...], order: Literal["C", "F"] = "C"
) -> MappedRows:
    """Maps a part of a file, for reading."""
    with path.open("rb") as file:
        array = np.memmap(file, dtype, "r", offset, shape, order).view(MappedRows)
        if order == "C" and array.dtype.kind in "fiub" and hasattr(os, "preadv"):
            array.descriptor = os.dup(file.fileno())
            weakref.finalize(array, os.close, array.descriptor)
    return array

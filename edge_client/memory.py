"""Memory that this process no longer needs, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import mmap

import numpy as np
import numpy.typing as npt


def give_back_memory() -> None:
    """Collects garbage and returns free pages, which the C library would keep for later."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return  # no glibc
    trim(0)


def forget_pages(array: npt.NDArray[np.generic]) -> None:
    """Drops the pages of a memory-mapped array from this process; they are read again when they are needed."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)

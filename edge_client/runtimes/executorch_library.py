"""ExecuTorch programs by ctypes: the functions of `executorch.cpp`, with errors as exceptions."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import numpy as np

from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.executorch_build import (
    INSTALL,
    LIBRARIES,
    build,
    built_library,
    find_wheel,
)
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.protocol.manifest import Dtype, TensorSpec

# torch's numbers of scalar types.
_DTYPES: dict[int, Dtype] = {
    0: "uint8",
    1: "int8",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    11: "bool",
}
# A program's tables and XNNPACK's constants must start at such an address.
_ALIGNMENT = 64
# What a program may plan when its manifest does not say.
MAX_PLANNED_BYTES = 1 << 32


class ProgramError(Exception):
    """ExecuTorch's own words about what failed."""


class Program:
    """One loaded program.

    Args:
        data: the contents of a .pte file; kept as long as the program.
        max_planned_bytes: refuses to load a program that wants larger arenas.

    Raises:
        ProgramError: not a program, made for another version, or one that needs what is not here.
        SessionError: no library, and none can be built.
    """

    def __init__(self, data: memoryview, max_planned_bytes: int = MAX_PLANNED_BYTES) -> None:
        self._library = library()
        self._data = _aligned(np.frombuffer(data, np.uint8))
        self._handle: int | None = self._library.edgetrain_et_open(
            self._data.ctypes.data, self._data.size, max_planned_bytes
        )
        if not self._handle:
            raise self._error()
        # Holds what is bound, by output flag and index.
        self._bound: dict[tuple[bool, int], Array] = {}
        self.inputs = self._describe(output=False)
        self.outputs = self._describe(output=True)

    @property
    def planned_bytes(self) -> int:
        """Size of the arenas for activations."""
        return int(self._library.edgetrain_et_planned_bytes(self._handle))

    def bind(self, index: int, array: Array, *, output: bool) -> None:
        """Reads an input from an array, or writes an output to it, at every run from now on; copies nothing.

        Raises:
            ProgramError: the array is not of the tensor's size.
        """
        assert array.flags.c_contiguous
        status = self._library.edgetrain_et_bind(self._handle, int(output), index, array.ctypes.data, array.nbytes)
        if status != 0:
            raise self._error()
        self._bound[output, index] = array

    def run(self) -> None:
        """Runs once on what is bound.

        Raises:
            ProgramError: a kernel refused its input, e.g. an index out of range.
        """
        if self._library.edgetrain_et_run(self._handle) != 0:
            raise self._error()

    def _describe(self, *, output: bool) -> tuple[TensorSpec, ...]:
        specs = []
        sizes = (ctypes.c_int32 * 16)()
        kind = ctypes.c_int32()
        for index in range(self._library.edgetrain_et_count(self._handle, int(output))):
            rank = self._library.edgetrain_et_describe(self._handle, int(output), index, ctypes.byref(kind), sizes)
            if rank < 0:
                raise self._error()
            if kind.value not in _DTYPES:
                raise ProgramError(f"a tensor of type {kind.value}, which bundles do not carry")
            specs.append(TensorSpec(name="", dtype=_DTYPES[kind.value], shape=tuple(sizes[:rank])))
        return tuple(specs)

    def _error(self) -> ProgramError:
        text: bytes = self._library.edgetrain_et_error()
        return ProgramError(text.decode(errors="replace"))

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle:
            self._library.edgetrain_et_close(handle)


def set_threads(count: int) -> int:
    """Sets the threads of the pool that all programs of the process share; 0 leaves it. Returns the number."""
    return int(library().edgetrain_et_threads(count))


@cache
def library() -> ctypes.CDLL:
    """The library, built first if it is not there yet.

    Raises:
        SessionError: no wheel, no compiler, or a library that does not load.
    """
    wheel = find_wheel()
    path = built_library(wheel) or build(wheel)
    try:
        # In this order, so that each finds what it needs already loaded.
        for name in LIBRARIES:
            ctypes.CDLL(os.fspath(wheel.library(name)), mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise SessionError(
            f"the executorch runtime does not load here: {error}. {INSTALL}, then "
            f"`edgetrain build-runtime executorch`{_named(path)}"
        ) from error
    _declare(loaded)
    return loaded


def _named(path: Path) -> str:
    return "" if path.exists() else f" ({path} is missing)"


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, u64, i32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int32
    signatures = {
        "edgetrain_et_open": (pointer, [pointer, u64, u64]),
        "edgetrain_et_close": (None, [pointer]),
        "edgetrain_et_error": (ctypes.c_char_p, []),
        "edgetrain_et_planned_bytes": (u64, [pointer]),
        "edgetrain_et_count": (i32, [pointer, i32]),
        "edgetrain_et_describe": (i32, [pointer, i32, i32, pointer, pointer]),
        "edgetrain_et_bind": (i32, [pointer, i32, i32, pointer, u64]),
        "edgetrain_et_run": (i32, [pointer]),
        "edgetrain_et_threads": (i32, [ctypes.c_uint32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def _aligned(data: Array) -> Array:
    """The same bytes at an aligned address: themselves where they are, as a mapped file is."""
    if data.ctypes.data % _ALIGNMENT == 0:
        return data
    room = np.empty(data.size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + data.size]
    copy[:] = data
    return copy

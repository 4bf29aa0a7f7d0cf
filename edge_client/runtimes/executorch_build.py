"""The small library between Python and ExecuTorch: where the wheel is, and how the library is compiled.

`executorch.cpp` is compiled once per version of the wheel and kept in the user's cache. Nothing here imports
the `executorch` package: its own Python code wants torch, its libraries do not.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgetrain.edge_client.errors import SessionError

SOURCE = Path(__file__).with_name("executorch.cpp")
# The first version whose wheels carry the libraries and headers that we use.
MINIMUM_VERSION = "1.5"
# Without its dependencies, which are for exporting: torch among them.
INSTALL = 'pip install --no-deps "executorch~=1.5.1"'
LIBRARIES = (
    "executorch",
    "executorch_threadpool",
    "executorch_kernels_optimized",
    "executorch_backend_xnnpack",
)
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared"),
    *("-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"),
)
# Names a library that was built elsewhere, for devices without a compiler.
LIBRARY_VARIABLE = "EDGETRAIN_EXECUTORCH_LIBRARY"


@dataclass(frozen=True, slots=True)
class Wheel:
    """An installed `executorch` package."""

    root: Path
    version: str

    def library(self, name: str) -> Path:
        """One of its shared libraries."""
        return self.root / "lib" / f"lib{name}{_SUFFIX}"


def find_wheel() -> Wheel:
    """The installed wheel.

    Raises:
        SessionError: not installed, or without the libraries.
    """
    # As importlib.metadata would find it, which reads mail headers and takes 3.5 MB of a device's memory for that.
    for folder in map(Path, sys.path):
        for info in folder.glob("executorch-*.dist-info"):
            version = info.name.removeprefix("executorch-").removesuffix(".dist-info")
            return check_wheel(Wheel(folder / "executorch", version))
    raise SessionError(f"runtime executorch is not installed: {INSTALL}")


def check_wheel(wheel: Wheel) -> Wheel:
    """The same, if what we link against is there.

    Raises:
        SessionError: a file is missing.
    """
    for path in (*map(wheel.library, LIBRARIES), wheel.root / "include"):
        if not path.exists():
            raise SessionError(
                f"executorch {wheel.version} at {wheel.root} has no {path.relative_to(wheel.root)}; {INSTALL} brings it"
            )
    return wheel


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names."""
    named = os.environ.get("CXX")
    if named:
        return named
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cached_library(wheel: Wheel) -> Path:
    """Where the library for this wheel is kept, built or not."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:12]
    name = f"executorch-{wheel.version}-{platform.system()}-{platform.machine()}-{key}{_SUFFIX}"
    return Path(base) / "edgetrain" / name


def built_library(wheel: Wheel) -> Path | None:
    """A library that is there already: the one the user names, or the cached one."""
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    cached = cached_library(wheel)
    return cached if cached.is_file() else None


def build(wheel: Wheel, *, compiler: str | None = None, out: Path | None = None) -> Path:
    """Compiles the library; takes seconds.

    Args:
        wheel: what to link against.
        compiler: command of the compiler, e.g. "aarch64-linux-gnu-g++"; None looks for one.
        out: None for the user's cache.

    Returns:
        The library's path. Whole or not there: it is renamed into place.

    Raises:
        SessionError: no compiler, or it failed, or `out` cannot be written.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise SessionError(
            "runtime executorch needs a C++ compiler once, and none was found. Install one "
            "(Debian, Raspberry Pi OS: sudo apt install g++; Termux: pkg install clang), or build on another "
            f"machine with `edgetrain build-runtime executorch -o FILE`, copy FILE here and set {LIBRARY_VARIABLE}"
        )
    out = out or cached_library(wheel)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            made = Path(folder) / out.name
            _compile(wheel, compiler, made)
            made.replace(out)
    except OSError as error:
        raise SessionError(f"cannot build the executorch runtime at {out}: {error}") from error
    return out


def _compile(wheel: Wheel, compiler: str, out: Path) -> None:
    include = wheel.root / "include"
    # The libraries are loaded before this one, by their full path, so it needs no run path.
    keep_all = () if sys.platform == "darwin" else ("-Wl,--no-as-needed",)
    command = [
        *shlex.split(compiler),
        *_FLAGS,
        *("-isystem", str(include)),
        *("-isystem", str(include / "executorch/runtime/core/portable_type/c10")),
        *(str(SOURCE), "-o", str(out), f"-L{wheel.root / 'lib'}"),
        *keep_all,
        *(f"-l{name}" for name in LIBRARIES),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise SessionError(f"no compiler {compiler!r}: install it, or set CXX to another") from None
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise SessionError(
            f"{compiler} could not compile the executorch runtime for executorch {wheel.version}: {reason}. "
            f"It is made for {INSTALL}"
        )

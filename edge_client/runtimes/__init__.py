"""The runtimes that can run a bundle, and how to open one.

A runtime registers under the entry-point group `edgetrain.runtimes`; a package outside this repository can
add one, or replace one of ours by taking its name. Ours are also known without installed metadata, so a
source tree on the path is enough.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.base import Batch, BundlePath, Half, Runtime, Session, Vector
from edgetrain.protocol.bundle import Bundle

__all__ = [
    "Batch",
    "Half",
    "Runtime",
    "Session",
    "Vector",
    "available_runtimes",
    "find_runtime",
    "open_session",
    "registered_runtimes",
]

GROUP = "edgetrain.runtimes"
_HERE = "edgetrain.edge_client.runtimes"
_BUILT_IN = {
    "onnxruntime": f"{_HERE}.onnxruntime:OnnxRuntime",
}


def open_session(bundle: BundlePath | Bundle, runtime: str | None = None, *, threads: int = 1) -> Session:
    """Loads a bundle on a runtime.

    Args:
        bundle: an opened bundle, or the path of a bundle directory or `.edge` archive.
        runtime: a name as in `available_runtimes`; None takes the bundle's first program that can run here.
        threads: threads of one step; 0 lets the runtime choose.

    Raises:
        SessionError: the runtime is unknown, not installed or too old, or the program does not load.
        BundleError: no bundle, a corrupt one, or one without a program for `runtime`.
    """
    if threads < 0:
        raise SessionError(f"threads is {threads}; give a number of threads, or 0 to let the runtime choose")
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    if runtime is not None:
        opened.manifest.program(runtime)
        return _usable(runtime).open(opened, threads=threads)
    reasons = []
    for program in opened.manifest.programs:
        try:
            chosen = _usable(program.runtime)
        except SessionError as error:
            reasons.append(str(error))
        else:
            return chosen.open(opened, threads=threads)
    raise SessionError(
        f"none of the runtimes of bundle {opened.manifest.name!r} can run here: " + "; ".join(reasons)
    )


def registered_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that are known, able to run here or not."""
    return tuple(_entry_points())


def available_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that can run here."""
    names = []
    for name in registered_runtimes():
        try:
            _usable(name)
        except SessionError:
            continue
        names.append(name)
    return tuple(names)


def find_runtime(name: str) -> Runtime:
    """The runtime of that name, able to run here or not.

    Raises:
        SessionError: nobody registered it, or its module does not import.
    """
    known = _entry_points()
    if name not in known:
        raise SessionError(f"no runtime is called {name!r}; known are: {', '.join(known)}")
    try:
        runtime = known[name].load()()
    except Exception as error:  # whatever a foreign package raises on import
        raise SessionError(f"runtime {name!r} ({known[name].value}) does not load: {error}") from error
    if not isinstance(runtime, Runtime):
        raise SessionError(f"runtime {name!r} ({known[name].value}) has no name, available() and open()")
    return runtime


def _usable(name: str) -> Runtime:
    runtime = find_runtime(name)
    reason = runtime.available()
    if reason is not None:
        raise SessionError(reason)
    return runtime


def _entry_points() -> dict[str, EntryPoint]:
    built_in = {name: EntryPoint(name, value, GROUP) for name, value in _BUILT_IN.items()}
    return built_in | {point.name: point for point in entry_points(group=GROUP)}

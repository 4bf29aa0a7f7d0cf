"""The runtimes that can run a bundle, and how to open one.

A package outside this repository adds one by an entry point of the group `edgetrain.runtimes`. Ours are
known without installed metadata too, so a source tree on the path is enough.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.base import Batch, BundlePath, Half, MixedPrecisionRuntime, Runtime, Session
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.vectors import Vector

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
# In the order in which they are named to users.
_BUILT_IN = {
    "onnxruntime": f"{_HERE}.onnxruntime:OnnxRuntime",
    "executorch": f"{_HERE}.executorch:ExecutorchRuntime",
    "ort-training": f"{_HERE}.ort_training:OrtTrainingRuntime",
    "torch": f"{_HERE}.torch:TorchRuntime",
}


def open_session(
    bundle: BundlePath | Bundle,
    runtime: str | None = None,
    *,
    threads: int = 1,
    precision: str = "fp32",
    load: bool = True,
) -> Session:
    """Opens a bundle on a runtime.

    Args:
        bundle: an opened bundle, or the path of a bundle directory or `.edge` archive.
        runtime: a name as in `available_runtimes`; None takes the bundle's first program that can run here.
        threads: threads of one step; 0 lets the runtime choose.
        precision: "fp32"; or "fp16" or "bf16" for the products of a step, where the runtime can.
        load: loads the step, too; else every graph waits until it is called.

    Raises:
        SessionError: the runtime is unknown, not installed or too old, cannot compute in that precision, or the
            program does not load.
        BundleError: no bundle, a corrupt one, or one without a program for `runtime`.
    """
    if threads < 0:
        raise SessionError(f"threads is {threads}; give a number of threads, or 0 to let the runtime choose")
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    if runtime is None:
        chosen = _first_usable(opened, precision)
    else:
        # A name that nobody has is said before a bundle that lacks it.
        find_runtime(runtime)
        opened.manifest.program(runtime)
        chosen = _usable(runtime)
        check_precision(chosen, precision)
    if isinstance(chosen, MixedPrecisionRuntime):
        session = chosen.open(opened, threads=threads, precision=precision)
    else:
        session = chosen.open(opened, threads=threads)
    if load:
        session.load()
    return session


def check_precision(runtime: Runtime, precision: str) -> None:
    """Refuses a precision that a runtime does not compute in.

    Raises:
        SessionError: with the reason.
    """
    allowed = runtime.precisions if isinstance(runtime, MixedPrecisionRuntime) else ("fp32",)
    if precision not in allowed:
        raise SessionError(
            f"runtime {runtime.name} computes in {', '.join(allowed)}, not in {precision}: mixed precision is for "
            "the runtime torch, on processors with 16-bit arithmetic. To save bytes elsewhere, export with --frozen"
        )


def registered_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that are known, able to run here or not."""
    return (*_BUILT_IN, *_foreign())


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
    try:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            runtime = getattr(importlib.import_module(module), attribute)()
        else:
            runtime = _foreign()[name]()()
    except KeyError:
        known = ", ".join(registered_runtimes())
        raise SessionError(f"no runtime is called {name!r}; known are: {known}") from None
    except Exception as error:  # whatever a foreign package raises on import
        raise SessionError(f"runtime {name!r} does not load: {error}") from error
    if not isinstance(runtime, Runtime):
        raise SessionError(f"runtime {name!r} does not load: it has no name, available() and open()")
    return runtime


def _first_usable(bundle: Bundle, precision: str) -> Runtime:
    """The runtime of the bundle's first program that can run here, in that precision.

    Raises:
        SessionError: there is none, with the reasons.
    """
    reasons = []
    for program in bundle.manifest.programs:
        try:
            chosen = _usable(program.runtime)
            check_precision(chosen, precision)
        except SessionError as error:
            reasons.append(str(error))
        else:
            return chosen
    raise SessionError(f"none of the runtimes of bundle {bundle.manifest.name!r} can run here: " + "; ".join(reasons))


def _usable(name: str) -> Runtime:
    runtime = find_runtime(name)
    reason = runtime.available()
    if reason is not None:
        raise SessionError(reason)
    return runtime


@functools.cache
def _foreign() -> dict[str, Callable[[], Any]]:
    """How to load what other packages registered, by name."""
    # Reads the metadata of every installed package: once, and only when one of ours will not do.
    from importlib.metadata import entry_points

    return {point.name: point.load for point in entry_points(group=GROUP) if point.name not in _BUILT_IN}

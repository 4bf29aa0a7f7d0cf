"""Where in the user's module an operator is called: for errors that name the place."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph.joint import Problem
from edgetrain.export.prepare import plain_math
from edgetrain.export.user_code import is_foreign

# Operators by which a tensor's value, or a shape that depends on it, reaches Python.
_DATA_DEPENDENT = re.compile(
    r"_local_scalar_dense|\bnonzero\b|\bitem\b|data-dependent|DataDependent|masked_select|unique"
)
# Where an operator is called that no module calls.
_OUTSIDE = "(the loss or a metric)"


@contextmanager
def module_path(module: nn.Module) -> Iterator[list[str]]:
    """Keeps the paths of the modules that are running; after an exception, the last is the culprit."""
    running: list[str] = []

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: running.append(path)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for path, part in module.named_modules():
        handles += [
            part.register_forward_pre_hook(enter(path), prepend=True),
            part.register_forward_hook(leave),
        ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def callers(problem: Problem, operator: str) -> list[str]:
    """Paths of the modules that call an ATen operator, or the forward of a backward one, in eager torch."""
    wanted = operator.split(".")[1 if operator.startswith(("aten.", "prims.")) else 0]
    wanted = wanted.split("_backward")[0]
    found: dict[str, None] = {}

    def note(func: Any, path: str | None) -> None:
        name = func._schema.name.partition("::")[2].rstrip("_")  # noqa: SLF001
        if name == wanted or name.endswith(f"_{wanted}"):
            found[_OUTSIDE if path is None else path] = None

    _watch(problem, note)
    return list(found)


def refuse_randomness(problem: Problem) -> None:
    """Refuses a model that draws random numbers in evaluation mode: no gradient of it can be proven.

    Raises:
        UnsupportedError: naming operator and module.
    """

    def refuse(func: Any, path: str | None) -> None:
        if torch.Tag.nondeterministic_seeded in func.tags and func._schema.name != "aten::dropout":  # noqa: SLF001
            where = "the loss or a metric" if path is None else _described(problem, path)
            raise UnsupportedError(
                f"random numbers in evaluation mode cannot be exported: {func} in {where}. Use "
                "nn.Dropout or F.dropout(…, training=self.training), or pass the noise as an "
                "input of the batch"
            )

    _watch(problem, refuse)


def _watch(problem: Problem, seen: Callable[[Any, str | None], None]) -> None:
    """Runs module, loss and metrics in eager torch, and shows each operator before it is called.

    Args:
        problem: what is run.
        seen: (operator, path of the module that calls it; None for the loss and the metrics).
    """
    with module_path(problem.prepared.module) as running:

        class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen(func, running[-1] if running else None)
                return func(*args, **(kwargs or {}))

        with plain_math(problem.prepared.module), torch.no_grad(), Watch():  # type: ignore[no-untyped-call]
            problem.evaluate(problem.parameters, problem.example.leaves, problem.weights)


def cannot_trace(problem: Problem, running: list[str], error: Exception) -> UnsupportedError:
    """The error for a forward that cannot be followed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_foreign(frame)]
    where = f"in module {_described(problem, running[-1])}" if running else "in the loss or a metric"
    at = f", {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    cause = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    if _DATA_DEPENDENT.search(f"{type(error).__name__} {error}"):
        named = re.search(r"aten[.:]+(\w+)", str(error))
        operator = f"aten.{named.group(1)}" if named else "aten._local_scalar_dense"
        return UnsupportedError(
            f"control flow that depends on tensor values cannot be exported: {operator} {where}{at}. "
            "Replace `if`, `while`, `.item()` or boolean indexing on tensors by torch.where or masks, or "
            f"decide it once in __init__. ({cause})"
        )
    return UnsupportedError(
        f"the forward pass cannot be traced {where}{at}. Rewrite that part with ordinary torch operators, "
        f"or leave it out of the exported module. ({cause})"
    )


def no_translation(problem: Problem, runtime: str, operator: str, cause: str) -> UnsupportedError:
    """The error for an operator that a runtime does not have."""
    paths = callers(problem, operator)
    where = ", ".join(_described(problem, path) for path in paths[:3]) or "the loss or the backward pass"
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return UnsupportedError(
        f"runtime {runtime!r} has no operator for {operator}, used in {where}{more}. Replace it by ordinary "
        f"operators, or freeze everything before it so that its backward is not needed. ({cause})"
    )


def _described(problem: Problem, path: str) -> str:
    if path == _OUTSIDE:
        return path
    return f"{path or '(top)'!r} ({type(problem.prepared.module.get_submodule(path)).__name__})"

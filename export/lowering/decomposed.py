"""Graphs that are decomposed already are not traced again to find that out: torch's exporters do it several times."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram


@contextmanager
def decomposed_once(known: Collection[object] = ()) -> Iterator[None]:
    """While it is active, a program that a table of decompositions would leave as it is stays the same object.

    Args:
        known: operators that need not be decomposed.
    """
    decompose = ExportedProgram.run_decompositions

    def where_needed(self: ExportedProgram, table: Any = None, **options: Any) -> ExportedProgram:
        nodes = [node for node in self.graph.nodes if node.target not in known]
        if table is not None and not any(node.target in table or _is_composite(node) for node in nodes):
            return self
        result: ExportedProgram = decompose(self, table, **options)
        return result

    ExportedProgram.run_decompositions = where_needed  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


def _is_composite(node: fx.Node) -> bool:
    """Whether a call is not yet one operator without effects, which is what an empty table leaves too."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # noqa: SLF001
    return bool(target._schema.is_mutable or target.has_kernel_for_dispatch_key(key))  # noqa: SLF001

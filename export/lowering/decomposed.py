"""Graphs that are decomposed already are not traced again to find that out: torch's exporters do it several times."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._export import utils as export_utils
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
    """Whether a call is not yet one operator without effects, or one that a table keeps by not naming it."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return False
    if target._schema.is_mutable:  # noqa: SLF001
        return True
    return export_utils._is_cia_op(target) and not export_utils._check_valid_to_preserve(target)  # noqa: SLF001

"""Translating without what torch's exporter and onnxscript do for nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from edgetrain.export.lowering.decomposed import decomposed_once


@contextmanager
def quicker() -> Iterator[None]:
    """Graphs are not decomposed again, translations looked up once, and rules tried on nodes that they may end in.

    One of onnxscript's rules lists all nodes of the graph before it looks at the one it is tried on, and it is tried on
    each: a third of an export.
    """
    from onnxscript.rewriter import RewriteRule  # noqa: PLC0415  # slow to import
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: PLC0415

    rewrite, look_up = RewriteRule.try_rewrite, ONNXRegistry.from_torchlib

    def where_it_may_match(self: RewriteRule, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        kind = self._target_pattern.output_nodes[0].op_identifier()
        return rewrite(self, model, graph, node, **options) if kind in {None, node.op_identifier()} else None

    def remembered(*, opset_version: int) -> Any:
        registry = copy.copy(_looked_up(look_up, opset_version))
        registry.functions = {operator: list(found) for operator, found in registry.functions.items()}
        return registry

    # Both have a translation, which says the same as their decomposition.
    translated = {torch.ops.aten.reshape.default, torch.ops.aten.native_batch_norm.default}
    RewriteRule.try_rewrite = where_it_may_match
    ONNXRegistry.from_torchlib = staticmethod(remembered)  # type: ignore[assignment,method-assign]
    try:
        with decomposed_once(known=translated):
            yield
    finally:
        RewriteRule.try_rewrite = rewrite
        ONNXRegistry.from_torchlib = look_up  # type: ignore[method-assign]


@functools.cache
def _looked_up(look_up: Callable[..., Any], opset_version: int) -> Any:
    """Translations of torch's operators: a second's work."""
    return look_up(opset_version=opset_version)

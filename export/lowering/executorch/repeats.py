"""What a graph computes twice is computed once, but for large windows: quick to gather again, and they would wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Windows that are so many times as large as their image are gathered again. At stride 2 they are 2.25 times as large.
_LARGE = 3


def merge_repeats(graph: fx.Graph) -> None:
    """Replaces every call that an earlier one has made with the same arguments, in place. All calls are pure."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or _is_large(node):
            continue
        key = node.op, node.target, _key(node.args), _key(node.kwargs)
        earlier = first.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def _is_large(node: fx.Node) -> bool:
    if node.target != aten.as_strided_copy.default:
        return False
    windows, image = (value.meta["val"].numel() for value in (node, *node.all_input_nodes))
    return bool(windows > _LARGE * image)


def _key(value: Any) -> Any:
    """A hashable form; 1, 1.0 and True are different."""
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, *(_key(item) for item in value)
    return value if isinstance(value, fx.Node) else (type(value), value)

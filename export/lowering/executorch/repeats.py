"""What a graph computes twice is computed once, but for windows: quick to gather again, large to keep until then."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_GATHERED_AGAIN = (aten.as_strided_copy.default,)


def merge_repeats(graph: fx.Graph) -> None:
    """Replaces every call that an earlier one has made with the same arguments, in place. All calls are pure."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or node.target in _GATHERED_AGAIN:
            continue
        key = node.op, node.target, _key(node.args), _key(node.kwargs)
        earlier = first.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def _key(value: Any) -> Any:
    """A hashable form; 1, 1.0 and True are different."""
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, *(_key(item) for item in value)
    return value if isinstance(value, fx.Node) else (type(value), value)

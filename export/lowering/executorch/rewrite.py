"""Rewrites a traced graph into operators that XNNPACK takes, knowing what is frozen and what is variable.

The graph is interpreted once more under a tracer: what depends on no input is computed now, and operators with
a rule (`rules`) are replaced by it. So a rule is an ordinary function on tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.executorch.layout import ELEMENTWISE, elementwise, from_last, part_of, to_last
from edgetrain.export.lowering.executorch.repeats import merge_repeats
from edgetrain.export.lowering.executorch.rules import RULES

aten = torch.ops.aten


def rewrite(graph: TracedGraph) -> fx.GraphModule:
    """The same function of the same inputs, in the operators of this module's rules."""
    once = fx.GraphModule(graph.module, fx_graph_cse(graph.module.graph))
    with torch.no_grad():
        module = make_fx(Rewriter(once).run)(*graph.example)
    _tidy(module)
    return module


def contiguous(graph: TracedGraph) -> TracedGraph:
    """With example inputs whose strides are those of their shapes.

    A dimension of size 1 may have any stride; ExecuTorch would take some for channels-last.
    """
    return replace(graph, example=tuple(torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in graph.example))


def _tidy(module: fx.GraphModule) -> None:
    """Removes what nobody reads, what is computed twice, views that change nothing, and views of views."""
    module.graph.eliminate_dead_code()
    merge_repeats(module.graph)
    for node in module.graph.nodes:
        if node.target == aten._unsafe_view.default:  # noqa: SLF001
            node.target = aten.view.default
        if node.op != "call_function" or any(user.op == "output" for user in node.users):
            continue
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target == aten.view.default:
            source = node.args[0]
            if source.target == aten.view.default:
                source = source.args[0]
                node.update_arg(0, source)
            if source.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(source)
    module.graph.eliminate_dead_code()
    module.recompile()


class Rewriter(fx.Interpreter):
    """Interprets a graph; see the module."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.node: fx.Node = next(iter(module.graph.nodes))
        self._constants: dict[tuple[object, ...], Tensor] = {}
        # Images of nodes, or of their first results, channels-last.
        self._last: dict[fx.Node, Tensor] = {}
        self._parts: dict[tuple[fx.Node, int], Tensor] = {}
        self.static: set[fx.Node] = set()
        for node in module.graph.nodes:
            if node.op == "get_attr" or (
                node.op == "call_function" and all(n in self.static for n in node.all_input_nodes)
            ):
                self.static.add(node)

    def run_node(self, n: fx.Node) -> Any:
        """Remembers the node, for the rules."""
        self.node = n
        result = super().run_node(n)
        part = part_of(n)
        if part is not None and part in self._parts:
            self._last[n] = self._parts[part]
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Computes, replaces or keeps one call."""
        if self.node in self.static:
            with disable_proxy_modes_tracing():
                return target(*args, **kwargs)
        rule = RULES.get(target)
        result = rule(self, *args, **kwargs) if rule else NotImplemented
        if result is NotImplemented and target in ELEMENTWISE:
            result = elementwise(self, target, args, kwargs)
        if result is NotImplemented:
            return super().call_function(target, args, kwargs)
        # Views that follow were traced on the strides of the original.
        if isinstance(result, tuple):
            return tuple(part if part is None else part.contiguous() for part in result)
        return result.contiguous()

    def is_static(self, index: int) -> bool:
        """Whether an argument of the current call is known now."""
        argument = self.node.args[index]
        return not isinstance(argument, fx.Node) or argument in self.static

    def value(self, node: fx.Node) -> Any:
        """What an earlier node computed."""
        return self.env[node]

    def has_last(self, argument: object) -> bool:
        """Whether an argument of the current call is at hand channels-last."""
        return isinstance(argument, fx.Node) and argument in self._last

    def last(self, index: int) -> Tensor:
        """An image that is an argument of the current call, channels-last; made now if it is not at hand."""
        node = self.node.args[index]
        assert isinstance(node, fx.Node), "an image"
        if node not in self._last:
            value: Tensor = self.env[node]
            self._last[node] = self.now(to_last, value) if node in self.static else to_last(value)
        return self._last[node]

    def image(self, image_NHWC: Tensor, part: int | None = None) -> Tensor:
        """The current call's result, or a part of it, row-major; remembers that it is at hand channels-last."""
        if part is None:
            self._last[self.node] = image_NHWC
        else:
            self._parts[self.node, part] = image_NHWC
        return from_last(image_NHWC)

    def shape(self) -> torch.Size:
        """Of the current call's (first) result, computed now."""
        with disable_proxy_modes_tracing():
            arguments = fx.node.map_arg(self.node.args, lambda node: self.env[node])
            assert callable(self.node.target), "a call"
            result = self.node.target(*arguments, **self.node.kwargs)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first.shape

    def constant(self, make: Callable[..., Tensor], *args: Any) -> Tensor:
        """A tensor that is computed now; the same for the same call."""
        key = (make, *args)
        if key not in self._constants:
            with disable_proxy_modes_tracing():
                self._constants[key] = make(*args).contiguous()
        return self._constants[key]

    def now(self, make: Callable[..., Tensor], *args: Any) -> Tensor:
        """A tensor that is computed now."""
        with disable_proxy_modes_tracing():
            return make(*args).contiguous()

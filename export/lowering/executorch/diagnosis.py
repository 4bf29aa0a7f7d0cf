"""Whether ExecuTorch computes what torch does, and which operator not: its wheels have kernels silently wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.relative_error import relative_error

Compile = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[[Sequence[Tensor]], Sequence[Tensor]]]
"""A module and example inputs -> the same function, run by ExecuTorch."""

# Largest error of a tensor, as a share of its largest element.
TOLERANCE = 1e-4
# Share of the features by which two roundings to int8 may differ.
ROUNDING = 0.01


def differs(got: Tensor, expected: Tensor) -> bool:
    """Whether two results are further apart than rounding explains."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return True
    if not expected.is_floating_point():
        return not torch.equal(got, expected)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    close = torch.isclose(got, expected, rtol=0.0, atol=TOLERANCE * largest + 1e-6, equal_nan=True)
    return not bool(close.all())


def check_integers(exact: Sequence[Tensor], reference: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Checks that an int8 trunk is as near to the float32 one as torch's own integers are.

    Args:
        exact: features in float32.
        reference: what torch computes for the quantized graph.
        got: what ExecuTorch's program computes for it.

    Raises:
        UnsupportedError: it is not: a kernel computes something else.
    """
    exactly, as_torch, as_here = ([tensor.numpy() for tensor in tensors] for tensors in (exact, reference, got))
    wanted, found = relative_error(as_torch, exactly), relative_error(as_here, exactly)
    if not found <= 2 * wanted + ROUNDING:
        raise UnsupportedError(
            f"the int8 trunk is off by {found:.1%} on executorch, by {wanted:.1%} in torch's reference of the same "
            "integers: a kernel is wrong. Use float32, or the runtime onnxruntime"
        )


def wrong_operator(module: fx.GraphModule, example: Sequence[Tensor], compile_: Compile) -> str | None:
    """The first operator that gives other numbers than torch on the same input; None if none does.

    All intermediate results are compared first, then the first that differs is run alone: an activation on the
    kink of a relu may fall to either side without any operator being wrong.
    """
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(module).run(*example)
    # XNNPACK refuses slices among a delegate's results that are its inputs too; what reads them is looked at.
    nodes = [
        n
        for n in module.graph.nodes
        if n.op == "call_function" and isinstance(values[n], Tensor) and n.target is not torch.ops.aten.slice.Tensor
    ]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    results = _run(module, graph, [(copies[n], values[n]) for n in nodes], example, compile_)
    for node, result in zip(nodes, results, strict=True):
        if differs(result, values[node]) and _wrong_alone(module, node, values, compile_):
            return str(node.target)
    return None


def _wrong_alone(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], compile_: Compile) -> bool:
    graph = fx.Graph()
    inputs = {n: graph.placeholder(n.name) for n in node.all_input_nodes}
    copy = graph.node_copy(node, lambda n: inputs[n])
    example = [values[n].contiguous() for n in inputs]
    (result,) = _run(module, graph, [(copy, values[node])], example, compile_)
    return differs(result, values[node])


def _run(
    module: fx.GraphModule,
    graph: fx.Graph,
    results: Sequence[tuple[fx.Node, Tensor]],
    example: Sequence[Tensor],
    compile_: Compile,
) -> Sequence[Tensor]:
    """What each node gives in the second run, in memory that the first has used.

    Results go through a product with 1, or they would be in the fresh memory of outputs.
    """
    graph.output(
        tuple(
            graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0)) if value.is_floating_point() else node
            for node, value in results
        )
    )
    run = compile_(fx.GraphModule(module, graph), example)
    run(example)
    return run(example)

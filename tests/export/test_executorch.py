"""Lowering to ExecuTorch: the guards against kernels that are wrong, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

pytest.importorskip("executorch.exir")

from edgetrain.export.errors import OperatorError
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering import get_lowering
from edgetrain.export.lowering.base import LoweredGraph
from edgetrain.export.lowering.executorch import compile as compiler
from edgetrain.export.lowering.executorch import rewrite, rules
from edgetrain.export.quiet import quiet
from edgetrain.protocol.bundle import Bundle
from support.executorch_bundles import cnn_bundle

aten = torch.ops.aten


def graph_of(operator, *arguments, **options):
    """One call of an operator on tensors, as a traced graph; tensors become inputs."""
    graph = fx.Graph()
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    inputs = iter([graph.placeholder(f"x{i}") for i in range(len(tensors))])
    node = graph.call_function(
        operator, tuple(next(inputs) if isinstance(a, torch.Tensor) else a for a in arguments), options
    )
    graph.output((node,))
    return TracedGraph(
        name="step",
        module=fx.GraphModule(torch.nn.Module(), graph),
        inputs=(),
        outputs=(),
        example=tuple(tensors),
    )


def run_lowered(graph):
    lowering = get_lowering("executorch")
    return lowering.load(lowering.lower(graph))([t.numpy() for t in graph.example])[0]


def run_stock(graph):
    """Through ExecuTorch's own exporter, without our rules."""
    with quiet():
        data = compiler.compile_module(graph.module, graph.example).data
    run = get_lowering("executorch").load(LoweredGraph(file="stock.pte", data=data))
    return torch.from_numpy(run([t.numpy() for t in graph.example])[0])


@pytest.fixture
def pool_backward():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    graph = graph_of(
        aten.max_pool2d_with_indices_backward.default,
        grad, x.detach(), [3, 3], [2, 2], [1, 1], [1, 1], False, indices,
    )  # fmt: skip
    # So that the gradient lies in the program's arena, as it does in every real step.
    inner, output = graph.module.graph, graph.module.graph.output_node()
    with inner.inserting_before(output):
        output.args = ((inner.call_function(aten.mul.Tensor, (output.args[0][0], 1.0)),),)
    graph.module.recompile()
    return graph, expected


def test_the_stock_kernel_of_the_max_pool_gradient_is_wrong_and_ours_is_right(pool_backward):
    graph, expected = pool_backward
    ours = torch.from_numpy(run_lowered(graph))
    torch.testing.assert_close(ours, expected)
    # The stock kernel adds to memory that nobody cleared: every run finds the sums of those before.
    with quiet():
        data = compiler.compile_module(graph.module, graph.example).data
    run = get_lowering("executorch").load(LoweredGraph(file="stock.pte", data=data))
    arrays = [t.numpy() for t in graph.example]
    stock = [torch.from_numpy(run(arrays)[0]).clone() for _ in range(3)]
    assert float((stock[2] - expected).abs().max()) > 0.5 * float(expected.abs().max())


def test_an_operator_whose_kernel_is_wrong_stops_the_export_with_its_name(pool_backward, monkeypatch):
    graph, _ = pool_backward
    monkeypatch.delitem(rules.RULES, aten.max_pool2d_with_indices_backward.default)
    with pytest.raises(OperatorError, match="max_pool2d_with_indices_backward.*wrong numbers"):
        get_lowering("executorch").lower(graph)


def test_the_stock_delegate_computes_the_exact_gelu_where_the_tanh_form_is_asked_for(monkeypatch):
    x = torch.linspace(-4, 4, 64)
    expected = F.gelu(x.double(), approximate="tanh").float()
    graph = graph_of(aten.gelu.default, x, approximate="tanh")
    assert float((run_stock(graph) - expected).abs().max()) > 1e-4
    # Whole, as a trace for inference leaves it.
    assert float((torch.from_numpy(run_lowered(graph)) - expected).abs().max()) < 1e-6
    monkeypatch.delitem(rules.RULES, aten.gelu.default)
    with pytest.raises(OperatorError, match=r"aten\.gelu.*wrong numbers"):
        get_lowering("executorch").lower(graph)


def test_a_copy_that_leaves_a_partition_beside_its_source_is_one_result():
    x = torch.randn(4, 6)
    graph = fx.Graph()
    product = graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), 2.0))
    copy = graph.call_function(aten.clone.default, (product,))
    # Kernels outside of XNNPACK read both.
    results = [graph.call_function(aten.cumsum.default, (node, dim)) for dim, node in enumerate((product, copy))]
    graph.output(tuple(results))
    traced = TracedGraph("step", fx.GraphModule(torch.nn.Module(), graph), (), (), (x,))
    with quiet():
        data = compiler.compile_module(traced.module, traced.example).data
    first, second = get_lowering("executorch").load(LoweredGraph(file="step.pte", data=data))([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(first), (2 * x).cumsum(0))
    torch.testing.assert_close(torch.from_numpy(second), (2 * x).cumsum(1))


def test_an_operator_without_a_kernel_is_named():
    with pytest.raises(OperatorError, match="special_bessel_j0"):
        get_lowering("executorch").lower(graph_of(aten.special_bessel_j0.default, torch.ones(3)))


def test_attention_over_a_row_that_is_wholly_masked_gives_zeros_as_in_torch():
    scores, mask = torch.randn(2, 4, 4), torch.zeros(2, 4, 4)
    mask[0, 1:, 0] = mask[1, 2] = -float("inf")
    expected = aten._safe_softmax(scores + mask, -1)
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    masked = graph.call_function(aten.add.Tensor, (a, b))
    graph.output((graph.call_function(aten._safe_softmax.default, (masked, -1)),))
    traced = TracedGraph("step", fx.GraphModule(torch.nn.Module(), graph), (), (), (scores, mask))
    torch.testing.assert_close(torch.from_numpy(run_lowered(traced)), expected)


@pytest.mark.parametrize("dims", [(0,), (2,), (0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_are_products_with_ones(dims, keepdim):
    x = torch.randn(3, 8, 5, 7)
    graph = graph_of(aten.sum.dim_IntList, x, list(dims), keepdim)
    module = rewrite.rewrite(graph)
    assert aten.bmm.default in {node.target for node in module.graph.nodes}
    torch.testing.assert_close(module(x)[0], x.sum(dims, keepdim), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("operator", [aten.sum.dim_IntList, aten.mean.dim])
@pytest.mark.parametrize("shape", [(96, 16), (64, 12), (70, 8), (128, 1), (64, 33), (513, 2)])
def test_sums_and_means_over_rows_of_few_columns(operator, shape):
    x = torch.randn(shape)
    module = rewrite.rewrite(graph_of(operator, x, [0], False))
    torch.testing.assert_close(module(x)[0], operator(x, [0], False), atol=1e-4, rtol=1e-5)


def test_what_is_frozen_is_computed_at_export_and_repeats_are_computed_once():
    graph = fx.Graph()
    x = graph.placeholder("x")
    eye = graph.call_function(aten.eye.default, (4,))
    twice = [graph.call_function(aten.mul.Tensor, (x, graph.call_function(aten.add.Tensor, (eye, 1)))) for _ in "ab"]
    graph.output((graph.call_function(aten.add.Tensor, tuple(twice)),))
    value = torch.randn(4, 4)
    traced = TracedGraph("step", fx.GraphModule(torch.nn.Module(), graph), (), (), (value,))
    module = rewrite.rewrite(traced)
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets == [aten.mul.Tensor, aten.add.Tensor]
    torch.testing.assert_close(module(value)[0], 2 * value * (torch.eye(4) + 1))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_choice_by_a_known_condition_is_a_product(swapped):
    """As the gradient of picking one token is traced, and a causal mask."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.eq.Scalar, (graph.call_function(aten.arange.default, (5,)), 0))
    other = graph.call_function(aten.full.default, ([5], 0.0 if swapped else -float("inf")))
    chosen = graph.call_function(aten.where.self, (first, other, x) if swapped else (first, x, other))
    graph.output((chosen if swapped else graph.call_function(aten._softmax.default, (chosen, -1, False)),))
    value = torch.randn(3, 5)
    x.meta["val"] = value
    traced = TracedGraph("step", fx.GraphModule(torch.nn.Module(), graph), (), (), (value,))
    module = rewrite.rewrite(traced)
    assert aten.where.self not in {node.target for node in module.graph.nodes}
    torch.testing.assert_close(module(value)[0], traced.module(value)[0])


def test_the_program_of_the_manifest_says_what_it_needs():
    program = Bundle(cnn_bundle()).manifest.program("executorch")
    assert program.minimum_version == "1.5"
    assert set(program.graphs) == {"step", "eval", "infer"}
    assert all(graph.planned_memory > 0 for graph in program.graphs.values())


def test_no_python_and_no_path_of_this_machine_is_in_the_program():
    data = Bundle(cnn_bundle()).read(Bundle(cnn_bundle()).manifest.program("executorch").graphs["step"].file)
    assert b".py" not in data
    assert b"/home" not in data
    assert b"site-packages" not in data

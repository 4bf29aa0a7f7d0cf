"""Traced graphs as exported programs, without being traced again."""

from __future__ import annotations

import io

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402
from torch._export.verifier import SpecViolationError  # noqa: E402
from torch.export.graph_signature import InputKind  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from edgetrain.export.lowering.exported import exported  # noqa: E402
from edgetrain.export.quiet import quiet  # noqa: E402


@pytest.fixture
def traced():
    """A graph with a parameter that is read twice, a buffer, a result that is an input, and one that is a constant."""
    torch.manual_seed(0)
    weight, offset = nn.Parameter(torch.randn(4, 3)), torch.randn(3)

    def function(x, unused):
        return x @ weight + offset, (x * weight.sum()), unused, offset

    example = torch.randn(2, 4), torch.randn(5)
    return make_fx(function)(*example), example


def test_the_program_is_what_torch_export_makes_of_the_graph(traced):
    module, example = traced
    with quiet(), torch.no_grad():
        program, expected = exported(module, example), torch.export.export(module, example, strict=False)
        results, saved = program.module()(*example), io.BytesIO()
        torch.export.save(program, saved)
        saved.seek(0)
        read = torch.export.load(saved).module()(*example)
    torch.testing.assert_close(list(results), list(module(*example)), rtol=0, atol=0)
    torch.testing.assert_close(list(read), list(module(*example)), rtol=0, atol=0)
    kinds = [spec.kind for spec in program.graph_signature.input_specs]
    assert sorted(kind.name for kind in kinds) == ["BUFFER", "PARAMETER", "USER_INPUT", "USER_INPUT"]
    assert {kind.name for kind in kinds} == {spec.kind.name for spec in expected.graph_signature.input_specs}
    operators = [[n.target for n in p.graph.nodes if n.op == "call_function"] for p in (program, expected)]
    assert operators[0] == operators[1]


def test_the_graph_stays_as_it_is_and_its_constants_are_shared(traced):
    module, example = traced
    before = str(module.graph)
    program = exported(module, example)
    assert str(module.graph) == before
    assert {value.data_ptr() for value in program.state_dict.values()} == {
        getattr(module, node.target).data_ptr() for node in module.graph.find_nodes(op="get_attr")
    }


def test_constants_may_be_used_before_the_inputs_are_named():
    """As in a quantized trunk."""
    module = nn.Module()
    module.scale = torch.full((2,), 3.0)
    graph = fx.Graph()
    scale = graph.call_function(torch.ops.aten.exp.default, (graph.get_attr("scale"),))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), scale)),))
    x = torch.randn(2)
    program = exported(fx.GraphModule(module, graph), (x,))
    assert [spec.kind for spec in program.graph_signature.input_specs] == [InputKind.BUFFER, InputKind.USER_INPUT]
    with quiet():
        torch.testing.assert_close(program.module()(x)[0], x * module.scale.exp())


def test_what_is_no_operator_is_refused():
    graph = fx.Graph()
    graph.output((graph.call_function(torch.nn.functional.relu, (graph.placeholder("x"),)),))
    with pytest.raises(SpecViolationError, match="relu"):
        exported(fx.GraphModule(nn.Module(), graph), (torch.randn(2),))

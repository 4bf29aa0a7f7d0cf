"""Pieces of a tensor's memory in ExecuTorch programs, and windows that are gathered once or twice."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("executorch.exir")

from executorch.exir._serialize._program import deserialize_pte_binary

from edgetrain.export.lowering.executorch import convolution as conv
from edgetrain.export.lowering.executorch.compile import compile_module
from edgetrain.export.lowering.executorch.pieces import piece
from edgetrain.export.lowering.executorch.repeats import merge_repeats
from edgetrain.export.quiet import quiet

aten = torch.ops.aten


def compiled(function, *inputs):
    """The program's results, its kernels, and the bytes that it plans."""
    with quiet(), torch.no_grad():
        from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

        program = compile_module(make_fx(function)(*inputs), inputs)
        module = _load_for_executorch_from_buffer(program.data)
        module.run_method("forward", inputs)
        results = [result.clone() for result in module.run_method("forward", inputs)]
    (plan,) = deserialize_pte_binary(program.data).program.execution_plan
    calls = [instruction.instr_args for instruction in plan.chains[0].instructions]
    names = [plan.operators[call.op_index].name for call in calls if hasattr(call, "op_index")]
    return results, names, program.planned


def overlapping(x):
    whole = x + 1
    return (piece(whole, 3, [1, 4, 5]) * piece(whole, 7, [1, 4, 5]) + piece(whole, 0, [1, 4, 5]),)


def nested(x):
    outer = piece(x + 1, 8, [5, 6])
    return (torch.bmm(piece(outer, 5, [1, 4, 5]), piece(outer, 10, [1, 5, 4])),)


def behind_views(x):
    whole = (x + 1).reshape(5, 8)
    return (torch.sigmoid(piece(whole, 6, [3, 10]).reshape(1, 30) * 2),)


def used_late(x):
    whole = x + 1
    early = piece(whole, 4, [1, 6, 6])
    other = torch.bmm(early, early)
    for _ in range(3):
        # Kernels outside of XNNPACK: each result could take the memory of what nobody reads any more.
        other = torch.cumsum(torch.bmm(other, other) * 0.1, 2)
    return (other + piece(whole, 0, [1, 6, 6]),)


@pytest.mark.parametrize("function", [overlapping, nested, behind_views, used_late])
def test_pieces_of_what_a_program_computes_cost_nothing(function):
    x = torch.randn(40)
    (result,), kernels, _ = compiled(function, x)
    assert "aten::as_strided_copy" not in kernels
    torch.testing.assert_close(result, function(x)[0])


def of_an_input(x):
    return (torch.sigmoid(piece(x, 7, [4, 5])),)


def that_leaves(x):
    whole = x + 1
    return whole * 2, piece(whole, 7, [4, 5])


def of_what_leaves(x):
    whole = x + 1
    return torch.sigmoid(piece(whole, 7, [4, 5])), whole


def that_leaves_in_another_shape(x):
    whole = x + 1
    return whole * 2, piece(whole, 7, [4, 5]).reshape(2, 10)


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (of_an_input, "as_strided_copy"),
        (that_leaves, "as_strided_copy"),
        (of_what_leaves, "as_strided_copy"),
        (that_leaves_in_another_shape, "view_copy"),
    ],
)
def test_pieces_of_what_the_caller_holds_and_of_what_leaves_are_copied(function, kernel):
    x = torch.randn(40)
    results, kernels, _ = compiled(function, x)
    assert f"aten::{kernel}" in kernels
    for result, expected in zip(results, function(x), strict=True):
        torch.testing.assert_close(result, expected)


def test_a_convolution_by_rows_plans_a_third_of_its_windows():
    geometry = conv.Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, weight = torch.randn(4, 16, 16, 32), torch.randn(32, 32, 3, 3) * 0.1

    def step(x, weight):
        return (conv.convolution(x * 2, weight, geometry),)

    (result,), kernels, planned = compiled(step, x, weight)
    torch.testing.assert_close(result, step(x, weight)[0], atol=1e-4, rtol=1e-4)
    # What the columns see, and nothing for the rows.
    assert kernels.count("aten::as_strided_copy") == 1
    assert planned < 9 * x.numel() * x.element_size()


@pytest.mark.parametrize(("stride", "times"), [(2, 1), (1, 2)])
def test_windows_are_gathered_again_only_if_they_are_large(stride, times):
    # At stride 1, windows are nine times as large as the image.
    sizes, strides = [7 // stride, 7 // stride, 3, 3], [9 * stride, stride, 9, 1]

    def step(x):
        return [aten.as_strided_copy.default(x, sizes, strides) * factor for factor in (2, 3)]

    module = make_fx(step)(torch.randn(9, 9))
    merge_repeats(module.graph)
    assert len(module.graph.find_nodes(op="call_function", target=aten.as_strided_copy.default)) == times

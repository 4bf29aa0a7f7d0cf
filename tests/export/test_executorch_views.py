"""Edge programs before they are cut: permutations, shapes, and the operands of products."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("executorch.exir")

from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    OutputMinMax,
    PerTensorQuant,
    XNNAbs,
    XNNBatchMatrixMultiply,
    XNNClamp,
    XNNConvert,
    XNNGraph,
    XNNQuantizedTensorValue,
    XNNStaticReshape,
    XNNStaticTranspose,
    XNNTensorValue,
    XNode,
    XValue,
)
from executorch.exir import EdgeCompileConfig, to_edge

from edgetrain.export.lowering import get_lowering
from edgetrain.export.lowering.base import LoweredGraph
from edgetrain.export.lowering.executorch.compile import delegate, emit
from edgetrain.export.lowering.executorch.decompositions import threshold_backward
from edgetrain.export.lowering.executorch.order import put_inside_in_order
from edgetrain.export.lowering.executorch.peephole import TRANSPOSE_B, convert_at_borders, shape_once, turn_inside
from edgetrain.export.lowering.executorch.settle import settle_shapes
from edgetrain.export.lowering.executorch.subgraph import tensor_of
from edgetrain.export.lowering.executorch.turns import PERMUTE, VIEW, simplify_turns, view_for_each
from edgetrain.export.quiet import quiet


def edge_of(function, *example):
    """The edge graph of a function, to run in torch."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    with quiet():
        edge = to_edge(
            torch.export.export(Module(), example), compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        # As before every lowering: a copy changes nothing.
        edge = edge.transform([RemoveCloneOpsTransform(preserve_input_output_copies=True)])
    return edge.exported_program().graph_module


def count(module, *targets):
    return sum(node.target in targets for node in module.graph.nodes)


def run(module, *tensors):
    """Every result row-major, as a program has it."""

    class RowMajor(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            return result.contiguous() if isinstance(result, torch.Tensor) else result

    return RowMajor(module).run(*tensors)


def check(module, function, *tensors):
    for got, expected in zip(run(module, *tensors), function(*tensors), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_is_turned_back_is_not_turned():
    x = torch.randn(3, 4, 5)

    def there_and_back(x):
        return (x.permute(1, 2, 0).contiguous().permute(2, 0, 1).exp(),)

    module = edge_of(there_and_back, x)
    simplify_turns(module)
    assert count(module, PERMUTE) == 0
    check(module, there_and_back, x)


def test_two_permutations_are_one():
    x = torch.randn(2, 3, 4, 5)

    def twice(x):
        return (x.permute(3, 0, 2, 1).contiguous().permute(1, 0, 3, 2).exp(),)

    module = edge_of(twice, x)
    simplify_turns(module)
    assert count(module, PERMUTE) == 1
    check(module, twice, x)


def test_a_permutation_that_moves_only_dimensions_of_size_one_is_a_view():
    x = torch.randn(4, 1, 5)

    def move(x):
        return (x.permute(1, 0, 2).exp(),)

    module = edge_of(move, x)
    simplify_turns(module)
    assert (count(module, PERMUTE), count(module, VIEW)) == (0, 1)
    check(module, move, x)


def test_turned_weights_reach_the_product_in_three_dimensions_by_one_permutation():
    x, weight = torch.randn(1, 6, 4), torch.randn(5, 4)

    def linear(x, weight):
        return (torch.bmm(x, weight.t().reshape(1, 4, 5)),)

    module = edge_of(linear, x, weight)
    simplify_turns(module)
    (permute,) = [node for node in module.graph.nodes if node.target == PERMUTE]
    assert list(permute.args[1]) == [0, 2, 1]
    assert [user.target.__name__ for user in permute.users] == ["aten.bmm.default"]
    check(module, linear, x, weight)


def test_an_input_is_not_handed_through():
    x = torch.randn(3, 4)

    def nothing(x):
        return (x.t().contiguous().t(),)

    module = edge_of(nothing, x)
    simplify_turns(module)
    (result,) = module.graph.output_node().args[0]
    assert result.op == "call_function"


def block(x, weight, bias, scale, rows):
    """Two products with what stands between them in a transformer: [2, 3, 4] outside, [1, 6, 4] in the products."""
    y = torch.bmm(x.reshape(1, 6, 4), weight).reshape(2, 3, 4) + bias
    gate = torch.sigmoid(y * y)
    z = y * gate * rows + scale
    return torch.bmm(z.reshape(1, 6, 4), weight), z + gate


def test_elementwise_operators_take_the_shape_of_the_products_around_them():
    tensors = (torch.randn(2, 3, 4), torch.randn(1, 4, 4), torch.randn(4), torch.randn(1, 1, 4), torch.randn(2, 3, 1))
    module = edge_of(block, *tensors)
    before = count(module, VIEW)
    settle_shapes(module)
    shapes = {tuple(n.meta["val"].shape) for n in module.graph.nodes if n.name.startswith(("aten_sigmoid", "aten_mul"))}
    assert shapes == {(1, 6, 4)}
    large = [n for n in module.graph.nodes if n.target == VIEW and n.meta["val"].numel() == 24]
    # The input, and the second result.
    assert len(large) == 2 < before
    check(module, block, *tensors)


def test_an_operand_that_repeats_over_the_batch_keeps_the_shape():
    tensors = torch.randn(2, 3, 4), torch.randn(1, 4, 4), torch.randn(3, 4)

    def positions(x, weight, added):
        y = torch.bmm(x.reshape(1, 6, 4), weight).reshape(2, 3, 4) + added
        return (torch.bmm(y.reshape(1, 6, 4), weight),)

    module = edge_of(positions, *tensors)
    settle_shapes(module)
    (add,) = [n for n in module.graph.nodes if n.name.startswith("aten_add")]
    assert tuple(add.meta["val"].shape) == (2, 3, 4)
    check(module, positions, *tensors)


def border(x, weight):
    """A view of an input, one between two products, and one that a kernel outside of XNNPACK reads."""
    y = torch.bmm(x.reshape(1, 4, 6), weight)
    z = torch.bmm(y.reshape(2, 2, 6), weight.expand(2, 6, 6) + 1)
    return (z.reshape(4, 6).cumsum(0),)


@pytest.mark.parametrize(("held", "inside"), [(False, [(2, 2, 6)]), (True, [(1, 4, 6), (2, 2, 6)])])
def test_views_at_the_border_of_a_partition_stand_outside(held, inside):
    tensors = torch.randn(4, 6), torch.randn(1, 6, 6)
    with quiet():
        edge = delegate(make_fx(border)(*tensors), tensors, held_inputs=held)
    module = edge.exported_program().graph_module
    parts = [part.original_module.graph_module for part in module.children() if hasattr(part, "original_module")]
    views = [tuple(n.meta["val"].shape) for part in parts for n in part.graph.nodes if n.target == VIEW]
    assert sorted(views) == inside


def test_every_reader_of_a_view_has_its_own():
    x = torch.randn(4, 6)

    def read_twice(x):
        y = x.reshape(2, 12)
        return y.exp(), y.sin(), y

    module = edge_of(read_twice, x)
    view_for_each(module)
    views = [node for node in module.graph.nodes if node.target == VIEW]
    assert [len(view.users) for view in views] == [1, 1, 1]
    check(module, read_twice, x)


def two_shapes(x):
    """A view that is read in its partition, and by a kernel outside of XNNPACK."""
    y = x * 2.0
    view = y.reshape(2, 12)
    return (
        torch.bmm(view.reshape(1, 2, 12), view.reshape(1, 12, 2)),
        view + 1.0,
        y + 1.0,
        view.cumsum(1),
        y.cumsum(0),
    )


def test_no_tensor_leaves_a_partition_in_two_shapes():
    x = torch.randn(4, 6)
    with quiet():
        edge = delegate(make_fx(two_shapes)(x), (x,))
        data = emit(edge).data
    parts = [part for part in edge.exported_program().graph_module.children() if hasattr(part, "original_module")]
    results = [n for part in parts for n in part.original_module.graph_module.graph.output_node().args[0]]
    # The product and both sums, and what is read outside, once.
    assert len(results) == 4
    got = get_lowering("executorch").load(LoweredGraph(file="step.pte", data=data))([x.numpy()])
    for result, expected in zip(got, two_shapes(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected)


def test_windows_of_two_layers_do_not_wait_for_each_other():
    """Each is gathered, multiplied and let go: the arena never holds both."""

    def two_gradients(x, grad):
        seen = [torch.ops.aten.as_strided_copy.default(x, [64, 9, 512], [1, step, 1]) for step in (8, 16)]
        return [torch.bmm(part.reshape(1, 576, 512), grad) for part in seen]

    tensors = torch.randn(1024), torch.randn(1, 512, 4)
    with quiet():
        compiled = emit(delegate(make_fx(two_gradients)(*tensors), tensors))
    one = 64 * 9 * 512 * 4
    assert one < compiled.planned < 1.1 * one
    run = get_lowering("executorch").load(LoweredGraph(file="step.pte", data=compiled.data))
    for result, expected in zip(run([t.numpy() for t in tensors]), two_gradients(*tensors), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)


def subgraph(*nodes, outputs):
    tensors = [
        XNNTensorValue(1, 3, [1, 2, 2], constant_buffer_idx=0, external_id=i, flags=0, id_out=i) for i in range(6)
    ]
    values = [XValue(tensor) for tensor in tensors]
    return XNNGraph("0", [XNode(node, 0) for node in nodes], values, 6, [0, 1], list(outputs), [])


def test_a_product_reads_its_second_operand_before_it_is_turned():
    turn = XNNStaticTranspose(num_dims=3, perm=[0, 2, 1], input_id=1, output_id=2, flags=0)
    product = XNNBatchMatrixMultiply(input1_id=0, input2_id=2, output_id=3, flags=0)
    graph = subgraph(turn, product, outputs=[3])
    turn_inside(graph)
    assert [node.xnode_union for node in graph.xnodes] == [product]
    assert (product.input2_id, product.flags) == (1, TRANSPOSE_B)
    assert 2 not in [value.xvalue_union.id_out for value in graph.xvalues]


def test_what_else_reads_the_turned_tensor_still_finds_it():
    turn = XNNStaticTranspose(num_dims=3, perm=[0, 2, 1], input_id=1, output_id=2, flags=0)
    second = XNNBatchMatrixMultiply(input1_id=0, input2_id=2, output_id=3, flags=0)
    first = XNNBatchMatrixMultiply(input1_id=2, input2_id=0, output_id=4, flags=0)
    graph = subgraph(turn, second, first, outputs=[3, 4])
    turn_inside(graph)
    assert [node.xnode_union for node in graph.xnodes] == [turn, second, first]
    assert (first.input1_id, first.flags) == (2, 0)


def test_other_permutations_stay():
    turn = XNNStaticTranspose(num_dims=3, perm=[1, 0, 2], input_id=1, output_id=2, flags=0)
    product = XNNBatchMatrixMultiply(input1_id=0, input2_id=2, output_id=3, flags=0)
    graph = subgraph(turn, product, outputs=[3])
    turn_inside(graph)
    assert len(graph.xnodes) == 2
    assert product.flags == 0


def test_one_tensor_in_one_shape_is_copied_once():
    first, again, other, result = (
        XNNStaticReshape(num_dims=2, new_shape=shape, input_id=0, output_id=output, flags=0)
        for shape, output in [([1, 4], 1), ([1, 4], 2), ([4, 1], 3), ([1, 4], 5)]
    )
    product = XNNBatchMatrixMultiply(input1_id=2, input2_id=3, output_id=4, flags=0)
    graph = subgraph(first, again, other, product, result, outputs=[4, 5])
    shape_once(graph)
    assert [node.xnode_union for node in graph.xnodes] == [first, other, product, result]
    assert (product.input1_id, product.input2_id) == (1, 3)
    assert 2 not in [value.xvalue_union.id_out for value in graph.xvalues]


class Mask(torch.nn.Module):
    """Something outside of XNNPACK stands between a relu and its gradient."""

    def forward(self, x):
        y = torch.relu(x)
        return threshold_backward(torch.cumsum(y * 3.0, 1), y, 0.0)


def test_a_mask_waits_as_bytes_and_is_exact():
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([[-1.0, -0.0, 0.0, tiny], [-tiny, 1e-20, 1.0, 3e38], [2.0, -3e38, 5.0, -1e-20]])
    with quiet():
        edge = delegate(make_fx(Mask())(x), (x,))
        data = emit(edge).data
    parts = [part for part in edge.exported_program().graph_module.children() if hasattr(part, "original_module")]
    crossing = [n.meta["val"].dtype for n in parts[0].original_module.graph_module.graph.output_node().args[0]]
    assert sorted(crossing, key=str) == [torch.float32, torch.int8]
    run = get_lowering("executorch").load(LoweredGraph(file="step.pte", data=data))
    (got,) = run([x.numpy()])
    y = torch.relu(x)
    assert torch.equal(torch.from_numpy(got), torch.cumsum(y * 3.0, 1) * (x > 0))


@pytest.mark.parametrize(
    ("scale", "bounds", "outputs", "left"),
    [
        (1.0, (0.0, 1.0), [4], 2),
        (1.0, (0.0, 1.0), [2, 4], 3),
        (1.0, (0.0, 1.0), [3, 4], 4),
        (0.5, (0.0, 1.0), [4], 4),
        (1.0, (0.0, 6.0), [4], 4),
    ],
    ids=["none leaves", "bytes leave", "floats leave", "something else in int8", "other numbers"],
)
def test_bytes_are_for_borders(scale, bounds, outputs, left):
    clamp = XNNClamp(input_id=0, output_id=1, flags=0)
    forth, back = XNNConvert(input_id=1, output_id=2, flags=0), XNNConvert(input_id=2, output_id=3, flags=0)
    reader = XNNAbs(input_id=3, output_id=4, flags=0)
    graph = subgraph(clamp, forth, back, reader, outputs=outputs)
    graph.xnodes[0].output_min_max = OutputMinMax(*bounds)
    graph.xvalues[2] = XValue(XNNQuantizedTensorValue(graph.xvalues[2].xvalue_union, PerTensorQuant(scale, 0)))
    convert_at_borders(graph)
    assert len(graph.xnodes) == left
    assert reader.input_id == (3 if left == 4 else 1)
    made = {node.xnode_union.output_id for node in graph.xnodes}
    assert made <= {tensor_of(value).id_out for value in graph.xvalues}


def test_inside_a_partition_what_is_made_is_used_before_more_is_made():
    makes, reads = [
        [
            XNNStaticReshape(num_dims=2, new_shape=[4], input_id=source, output_id=output, flags=0)
            for source, output in numbers
        ]
        for numbers in ([(0, 1), (0, 2)], [(1, 3), (2, 4)])
    ]
    graph = subgraph(*makes, *reads, outputs=[3, 4])
    put_inside_in_order(graph)
    assert [node.xnode_union for node in graph.xnodes] == [makes[0], reads[0], makes[1], reads[1]]

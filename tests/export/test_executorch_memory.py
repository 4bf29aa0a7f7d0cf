"""Where tensors lie in the arena, and in which order instructions run."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("executorch.exir")

from executorch.exir import to_edge
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.lowering.executorch.early import compute_early
from edgetrain.export.lowering.executorch.memory import Block, least, place
from edgetrain.export.lowering.executorch.order import put_in_order
from edgetrain.export.quiet import quiet

blocks = st.builds(
    lambda size, first, length: Block(size * 16, first, first + length),
    st.integers(1, 64),
    st.integers(0, 20),
    st.integers(0, 12),
)


@given(st.lists(blocks, max_size=30))
def test_tensors_that_live_together_do_not_overlap_and_the_arena_holds_all(found):
    offsets, size = place(found)
    for (a, i), (b, j) in itertools.combinations(zip(found, offsets, strict=True), 2):
        if a.first <= b.last and b.first <= a.last:
            assert i + a.size <= j or j + b.size <= i
    assert size == max((offset + block.size for block, offset in zip(found, offsets, strict=True)), default=0)
    alive = [sum(b.size for b in found if b.first <= when <= b.last) for when in range(40)]
    assert least(found) == max(alive)
    assert size >= least(found)


def test_a_chain_needs_two_tensors_and_a_tensor_that_waits_one_more():
    chain = [Block(100, i, i + 1) for i in range(10)]
    assert place(chain)[1] == 200
    assert place([*chain, Block(50, 0, 10)])[1] == 250


def test_what_frees_more_runs_first_and_the_result_is_the_same():
    """Two large products, each summed at once: computed one after the other, not both first."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    large = [graph.call_function(torch.ops.aten.mul.Tensor, (x, n)) for n in (2.0, 3.0)]
    small = [graph.call_function(torch.ops.aten.sum.default, (node,)) for node in large]
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, tuple(small)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    value = torch.randn(100)
    for node, size in [(x, 100), *((n, 100) for n in large), *((n, 1) for n in small)]:
        node.meta["val"] = torch.empty(size)
    expected = module(value)[0]
    put_in_order(module)
    names = [node.name for node in module.graph.nodes if node.op == "call_function"]
    assert names[:4] == [large[0].name, small[0].name, large[1].name, small[1].name]
    assert torch.equal(module(value)[0], expected)


def test_a_slope_is_computed_where_what_it_is_made_of_is():
    """GELU's slope in place of gate and square; a mask beside an activation that is kept anyway would be one more."""

    example = torch.randn(4, 8), torch.randn(8, 8), torch.randn(4, 8)

    def gelu(x, weight, grad):
        h = x @ weight
        square = h * h
        gate = torch.sigmoid(h * (square * 0.5 + 1))
        y = h * gate
        slope = gate + y * ((1 - gate) * (square * 1.5))
        return y, torch.sin(grad) * slope

    def relu(x, weight, grad):
        y = torch.relu(x @ weight)
        return y, torch.sin(grad) * torch.clamp(y * 3e38, 0.0, 1.0)

    for function, expected in ((gelu, ["sub", "mul", "mul", "mul", "add"]), (relu, [])):
        with quiet():
            edge = to_edge(torch.export.export(make_fx(function)(*example), example))
        nodes = list(edge.exported_program().graph.nodes)
        calls = [node for node in nodes if node.op == "call_function"]
        # As the partitioner would: what only the second result needs is computed where the gradient comes.
        forward = set(nodes[-1].args[0][0].all_input_nodes) | {nodes[-1].args[0][0]}
        while more := {source for node in forward for source in node.all_input_nodes} - forward:
            forward |= more
        partitions = {
            node: "forward" if node in forward else "backward" for node in calls if "dim_order" not in node.name
        }
        moved = compute_early(nodes, partitions)
        assert set(moved.values()) <= {"forward"}
        assert [node.name.split("_")[1] for node in calls if node in moved] == expected

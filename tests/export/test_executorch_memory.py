"""Where tensors lie in the arena, and in which order instructions run."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("executorch.exir")

from torch import fx

from edgetrain.export.lowering.executorch.memory import Block, least, place
from edgetrain.export.lowering.executorch.order import put_in_order

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

"""Rows that nothing reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.export.batch import read_example
from edgetrain.export.exporter import make_problem
from edgetrain.export.graph.narrow import narrowed_problem
from edgetrain.export.prepare import prepare
from edgetrain.models.transformer import Block, padding_mask
from support.layers import squared
from support.steps import Step

aten = torch.ops.aten
B, T, D = 3, 10, 8


class Reader(nn.Module):
    """Two blocks, and a head on what `read` takes from the sequence."""

    def __init__(self, read, norm_first, causal=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(D, 2, norm_first=norm_first) for _ in range(2))
        self.head = nn.Linear(D, 4)
        self.read, self.causal = read, causal

    def forward(self, x, allowed):
        for block in self.blocks:
            x = block(x, None if self.causal else padding_mask(allowed), causal=self.causal)
        return self.head(self.read(x))


READERS = {
    "first": lambda x: x[:, 0],
    "last": lambda x: torch.tanh(x)[:, -1],
    "some": lambda x: x[:, 2:5].flatten(1).reshape(B, -1, D),
    "mean": lambda x: x.mean(1),
    "two": lambda x: x[:, 0] + x[:, 3],
    "all": lambda x: x[:, 0] + x.mean(1),
}


def batch():
    allowed = (torch.arange(T) < torch.tensor([[10], [4], [7]])).float()
    return (torch.randn(B, T, D), allowed), ()


@pytest.mark.parametrize(
    ("name", "norm_first"), [("first", False), ("last", True), ("some", True), ("two", True), ("all", False)]
)
def test_gradients_stay_what_they_are(name, norm_first):
    module = Reader(READERS[name], norm_first)
    Step(module, squared, batch()).assert_matches_eager()


def test_a_causal_mask_is_not_cut():
    class Causal(Reader):
        def forward(self, x):
            return super().forward(x, None)

    Step(Causal(READERS["last"], norm_first=True, causal=True), squared, (batch()[0][0], ())).assert_matches_eager()


@pytest.mark.parametrize(("name", "rows"), [("first", 1), ("some", 3), ("mean", None), ("two", None), ("all", None)])
def test_the_last_block_works_on_what_is_read(name, rows):
    problem = make_problem(prepare(Reader(READERS[name], False), "all"), squared, read_example(batch(), None))
    narrowed = narrowed_problem(problem)
    assert (narrowed is None) == (rows is None)
    if narrowed is None:
        return
    graph = narrowed.prepared.module
    seen = []

    class Record(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            result = super().call_function(target, args, kwargs)
            if target is aten.linear.default:
                seen.append(result.shape[1])
            return result

    Record(graph).run(*problem.example.inputs.tensors)
    # Query, key, value, output projection, up, down of each block; the head.
    assert seen[:6] == [T] * 6
    assert sorted(seen[6:12]) == sorted([rows, T, T, rows, rows, rows])


def test_a_model_without_attention_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x):
            return F.relu(self.layer(x))[:, 0]

    problem = make_problem(prepare(Plain(), "all"), squared, read_example((torch.randn(B, T, D), ()), None))
    assert narrowed_problem(problem) is None

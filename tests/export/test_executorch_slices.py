"""Large steps on ExecuTorch: computed a few samples at a time, the same from outside."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("executorch.exir")

from edgetrain.edge_client.runtimes.executorch_library import Program
from edgetrain.export.batch import read_example
from edgetrain.export.exporter import make_problem
from edgetrain.export.graph.joint import trace_step
from edgetrain.export.graph.partition import split_step
from edgetrain.export.lowering import get_lowering
from edgetrain.export.lowering.executorch import slices
from edgetrain.export.prepare import prepare
from edgetrain.export.program import Translator
from edgetrain.models.losses import cross_entropy

LOWERING = get_lowering("executorch")


class Layers(nn.Module):
    """Two layers on each of some positions, and the mean of these."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, 5)

    def forward(self, x_BTI):
        return self.second(torch.relu(self.first(x_BTI))).mean(1)


class Deep(Layers):
    """The first layer is worth a trunk."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 8))


class Centred(Layers):
    """The samples of a batch influence each other."""

    def forward(self, x_BTI):
        return super().forward(x_BTI - x_BTI.mean(0))


class OneSize(Layers):
    """Written for batches of four."""

    def forward(self, x_BTI):
        return super().forward(x_BTI).reshape(4, 5)


class Unused(Layers):
    """A parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))


def problem_of(module, samples, positions, trainable):
    torch.manual_seed(0)
    batch = torch.randn(samples, positions, 6), torch.randint(0, 5, (samples,))
    return make_problem(prepare(module, trainable), cross_entropy, read_example(batch, None))


def traced(module, samples=4, positions=3, trainable="all"):
    """The step as an export traces it; it can be traced for fewer samples."""
    problem = problem_of(module, samples, positions, trainable)
    decompositions = LOWERING.decompositions()

    def first(count):
        return trace_step(problem.first(count), decompositions)

    return replace(trace_step(problem, decompositions), first=first)


def lowered_whole(graph):
    return LOWERING.lower(replace(graph, first=None))


def run(graph, lowered, inputs):
    return LOWERING.load(lowered)([tensor.numpy() for tensor in inputs])


def assert_is_the_step(graph, lowered, inputs=None):
    inputs = graph.example if inputs is None else inputs
    for got, expected in zip(run(graph, lowered, inputs), graph.module(*inputs), strict=True):
        np.testing.assert_allclose(got, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def small(monkeypatch):
    """Everything is large."""
    monkeypatch.setattr(slices, "LARGE", 1)
    monkeypatch.setattr(slices, "OUTWEIGHS", 0)


def test_what_is_alive_and_the_gradients_decide(monkeypatch):
    graph = traced(Layers())
    monkeypatch.setattr(slices, "most_alive", lambda *_: 100 << 20)
    assert slices.slices_for(graph, graph.module).count == 4
    monkeypatch.setattr(slices, "most_alive", lambda *_: slices.LARGE + 1)
    assert slices.slices_for(graph, graph.module).count == 2
    monkeypatch.setattr(slices, "most_alive", lambda *_: slices.LARGE)
    assert slices.slices_for(graph, graph.module) is None
    monkeypatch.setattr(slices, "most_alive", lambda *_: 20 << 20)
    monkeypatch.setattr(slices, "OUTWEIGHS", 1 << 20)
    assert slices.slices_for(graph, graph.module) is None


def test_an_odd_micro_batch_stays_whole(small):
    graph = traced(Layers(), samples=3)
    assert slices.slices_for(graph, graph.module) is None


def test_a_large_step_takes_a_part_of_the_memory_and_gives_the_same():
    graph = traced(Layers(width=512), positions=1 << 10)
    lowered, whole = LOWERING.lower(graph), lowered_whole(graph)
    assert lowered.planned_memory < 0.7 * whole.planned_memory
    assert len(lowered.data) < 1.5 * len(whole.data)
    assert_is_the_step(graph, lowered)
    assert LOWERING.lower(graph).data == lowered.data


def test_of_an_export_every_run_starts_anew_and_every_sample_counts(small):
    graph, lowered = Translator(LOWERING, problem_of(Layers(), 4, 3, "all")).translate(trace_step)
    assert lowered.data != lowered_whole(graph).data
    program = Program(memoryview(lowered.data))
    assert [spec.shape for spec in program.inputs] == [spec.shape for spec in graph.inputs]
    results = [np.full(spec.shape, np.nan, spec.dtype) for spec in program.outputs]
    for index, result in enumerate(results):
        program.bind(index, result, output=True)
    leaf = next(i for i, spec in enumerate(graph.inputs) if spec.name.startswith("inputs"))
    for sample in (0, 3, 1, 2):
        inputs = [tensor.clone() for tensor in graph.example]
        inputs[leaf][sample] *= 3
        for index, tensor in enumerate(inputs):
            program.bind(index, tensor.numpy(), output=False)
        program.run()
        for got, expected in zip(results, graph.module(*inputs), strict=True):
            np.testing.assert_allclose(got, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [Centred(), OneSize()], ids=["not a sum", "one size"])
def test_what_cannot_be_taken_apart_stays_whole(small, module):
    graph = traced(module)
    found = slices.slices_for(graph, graph.module)
    assert found is not None
    assert slices.first_slice(graph, found) is None


def test_a_parameter_without_gradient_is_no_hindrance(small):
    graph = traced(Unused())
    lowered = LOWERING.lower(graph)
    assert lowered.data != lowered_whole(graph).data
    assert_is_the_step(graph, lowered)


def test_a_head_is_taken_apart_too(small):
    step = traced(Deep(), trainable="second")
    inputs = [spec.name for spec in step.inputs if spec.name.startswith("inputs")]
    parts = split_step(step, num_parameters=2, inputs=inputs, micro_batch=4)
    lowered = LOWERING.lower(parts.head_step)
    assert lowered.data != lowered_whole(parts.head_step).data
    assert_is_the_step(parts.head_step, lowered)
    assert parts.head_eval.first is None

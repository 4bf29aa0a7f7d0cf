"""The module, the loss and the backward pass as pure functions, traced to ATen graphs.

    step(parameters, batch leaves, weights) -> loss_sum, weight_sum, metrics, gradients

The gradients are taken *inside* the traced function, so the graph holds the backward of the chosen parameters
and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from edgetrain.export.batch import (
    WEIGHTS,
    Example,
    Loss,
    call_module,
    flatten_outputs,
    per_sample_loss,
    tensor_spec,
)
from edgetrain.export.graph.before_autograd import before_autograd, standard
from edgetrain.export.graph.decompositions import Decompositions
from edgetrain.export.graph.fold import fold_batch_norms
from edgetrain.export.graph.ghost import use_ghost_norms
from edgetrain.export.graph.tidy import VIEWS, drop_unused_leaves, mutates, name_constants, simplify
from edgetrain.export.metrics import Metric, weighted_sum
from edgetrain.export.prepare import Prepared, plain_math
from edgetrain.protocol.graph_names import GRADIENT, METRIC, PARAMETER
from edgetrain.protocol.int8 import nearest
from edgetrain.protocol.manifest import CLIP_NORM, STEP_CLIPPED, TensorSpec


@dataclass(frozen=True)
class Problem:
    """What is to be learned: all that the functions close over."""

    prepared: Prepared
    loss: Loss
    metrics: Mapping[str, Metric]
    example: Example
    # Positive and not all alike, so that a forgotten weight shows. [B] or [B, T].
    weights: Tensor
    # Targets of this value weigh nothing; None if every target counts.
    ignore_index: int | None = None
    # The example's value of the input of `step_per_sample_clipped`, a scalar.
    clip_norm: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    # Parameters that the device keeps in int8.
    int8: frozenset[str] = frozenset()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Initial values, in manifest order."""
        return tuple(self.prepared.trainable.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `parameters`."""
        return tuple(self.prepared.trainable)

    def first(self, samples: int) -> Problem:
        """The same, with the first samples of the example for its micro-batch."""
        return replace(self, example=self.example.first(samples), weights=self.weights[:samples])

    def representable(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Values of the parameters, those in int8 rounded to what it holds."""
        return tuple(
            round_rows(parameter) if name in self.int8 else parameter
            for name, parameter in zip(self.names, parameters, strict=True)
        )

    def merged_outputs(self, parameters: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Any:
        """What the module returns once its adapters are merged into the weights."""
        state = self.prepared.adapters.merged(dict(zip(self.names, parameters, strict=True)))
        return call_module(self.prepared.base, state, self.example, inputs)

    def outputs(self, parameters: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Any:
        """What the module returns in training."""
        state = dict(zip(self.names, parameters, strict=True))
        return call_module(self.prepared.module, state, self.example, inputs)

    def split(self, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Any]:
        """The input leaves, and the targets in the user's structure."""
        count = len(self.example.inputs.tensors)
        return tuple(leaves[:count]), self.example.targets.rebuild(tuple(leaves[count:]))

    def evaluate(self, parameters: Sequence[Tensor], leaves: Sequence[Tensor], weights: Tensor) -> Evaluation:
        """Runs the module, the loss and the metrics. Sizes may differ from the example's in dimension 0."""
        inputs, targets = self.split(leaves)
        outputs = self.outputs(parameters, inputs)
        losses = per_sample_loss(self.loss(outputs, targets), leaves[0].shape[0]).to(weights.dtype)
        if self.ignore_index is not None:
            weights = weights * (targets != self.ignore_index)
        with torch.no_grad():
            values = {name: metric(outputs, targets).detach() for name, metric in self.metrics.items()}
        return Evaluation(losses, weights, values)


def round_rows(weight: Tensor) -> Tensor:
    """A weight [O, ...] rounded to int8 with a scale for every row."""
    whole, scale = nearest(weight.detach().numpy())
    return torch.from_numpy(whole * scale)


class Evaluation(NamedTuple):
    """Losses, weights and metric values per sample (and token)."""

    losses: Tensor
    weights: Tensor
    values: dict[str, Tensor]

    def sums(self) -> dict[str, Tensor]:
        """The weighted sums that a graph gives, in its order."""
        losses = self.losses.detach()
        metrics = {f"{METRIC}{name}": weighted_sum(value, self.weights) for name, value in self.values.items()}
        return {"loss_sum": (losses * self.weights).sum(), "weight_sum": self.weights.sum(), **metrics}


@dataclass(frozen=True)
class TracedGraph:
    """One graph in ATen operators, ready to be lowered. Frozen tensors are buffers of the module."""

    name: str
    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    # Values of the inputs in the example.
    example: tuple[Tensor, ...]
    # Of the step: traces it without its gradients, for runtimes that differentiate by themselves.
    forward: Callable[[Decompositions], TracedGraph] | None = None
    # Of the step: traces it for the first samples of its micro-batch. User code runs: anything may be raised.
    first: Callable[[int], TracedGraph] | None = None


def trace_step(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The training step."""

    def step(parameters: Sequence[Tensor], leaves: Sequence[Tensor], weights: Tensor) -> dict[str, Tensor]:
        parameters = [parameter.detach().requires_grad_() for parameter in parameters]
        evaluation = problem.evaluate(parameters, leaves, weights)
        gradients = _gradients(evaluation, parameters)
        return evaluation.sums() | _named(problem, gradients)

    graph = _trace("step", problem, step, problem.example.leaves, decompositions)
    return replace(graph, forward=partial(trace_eval, problem))


def trace_eval(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The step without gradients."""

    def evaluate(parameters: Sequence[Tensor], leaves: Sequence[Tensor], weights: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return problem.evaluate(parameters, leaves, weights).sums()

    return _trace("eval", problem, evaluate, problem.example.leaves, decompositions)


def trace_infer(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The module alone."""

    def infer(parameters: Sequence[Tensor], leaves: Sequence[Tensor], _weights: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return flatten_outputs(problem.merged_outputs(parameters, tuple(leaves)))

    return _trace("infer", problem, infer, problem.example.inputs.tensors, standard(decompositions))


def trace_step_per_sample_clipped(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The step with every sample's gradient clipped to a norm before the sum.

    Abadi et al. 2016, arXiv:1607.00133. A sample's gradient is that of its weighted loss, over all
    parameters together. One more input, `clip_norm`, and one more output, `norms` [B]: the norms before
    clipping.
    """

    def of_sample(
        parameters: tuple[Tensor, ...], leaves: tuple[Tensor, ...], weights: Tensor
    ) -> tuple[Tensor, Evaluation]:
        evaluation = problem.evaluate(parameters, [leaf.unsqueeze(0) for leaf in leaves], weights.unsqueeze(0))
        losses, weights, values = evaluation
        alone = Evaluation(losses[0].detach(), weights[0], {key: value[0] for key, value in values.items()})
        return (losses * weights.unsqueeze(0)).sum(), alone

    def step(
        parameters: Sequence[Tensor], leaves: Sequence[Tensor], weights: Tensor, clip_norm: Tensor
    ) -> dict[str, Tensor]:
        per_sample = torch.func.vmap(torch.func.grad(of_sample, has_aux=True), in_dims=(None, 0, 0))
        gradients, evaluation = per_sample(tuple(parameters), tuple(leaves), weights)
        flat = [g.flatten(1) for g in gradients]
        norms = torch.stack([(g * g).sum(1) for g in flat]).sum(0).sqrt()
        factors = torch.clamp(clip_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny), max=1.0)
        clipped = [(factors @ g).view(shaped.shape[1:]) for g, shaped in zip(flat, gradients, strict=True)]
        return Evaluation(*evaluation).sums() | _named(problem, clipped) | {"norms": norms}

    leaves = problem.example.leaves
    graph = _trace(STEP_CLIPPED, problem, step, leaves, decompositions, {CLIP_NORM: problem.clip_norm})
    use_ghost_norms(graph.module)
    return graph


def _gradients(evaluation: Evaluation, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    losses = evaluation.losses
    if not losses.requires_grad:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(
        losses, parameters, grad_outputs=evaluation.weights, allow_unused=True, materialize_grads=True
    )


def _named(problem: Problem, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{GRADIENT}{name}": gradient for name, gradient in zip(problem.names, gradients, strict=True)}


def _trace(
    name: str,
    problem: Problem,
    function: Callable[..., dict[str, Tensor]],
    leaves: Sequence[Tensor],
    decompositions: Decompositions,
    further: Mapping[str, Tensor] | None = None,
) -> TracedGraph:
    further = further or {}
    P, L = len(problem.parameters), len(leaves)
    outputs: dict[str, Tensor] = {}

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs.clear()
        outputs.update(function(tensors[:P], tensors[P : P + L], *tensors[P + L :]))
        return tuple(outputs.values())

    values = (*problem.parameters, *leaves, problem.weights, *further.values())
    names = (
        *(f"{PARAMETER}{parameter}" for parameter in problem.names),
        *problem.example.leaf_names[: len(leaves)],
        WEIGHTS,
        *further,
    )
    with plain_math(problem.prepared.module), before_autograd(decompositions):
        views_kept = {op: rule for op, rule in decompositions.items() if op not in VIEWS}
        module = make_fx(flat, decomposition_table=views_kept)(*values)
        if mutates(module):
            pure = torch.func.functionalize(fx.Interpreter(module).run, remove="mutations")
            module = make_fx(pure, decomposition_table=dict(decompositions))(*values)
    name_constants(module, problem.prepared.constant_names())
    simplify(module)
    fold_batch_norms(module)
    kept = drop_unused_leaves(module, P)
    return TracedGraph(
        name=name,
        module=module,
        inputs=tuple(tensor_spec(names[i], values[i]) for i in kept),
        outputs=tuple(tensor_spec(key, value) for key, value in outputs.items()),
        example=tuple(values[i] for i in kept),
    )

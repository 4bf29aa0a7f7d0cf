"""The module, the loss and the backward pass as pure functions, traced to ATen graphs.

    step(parameters, batch leaves, weights) -> loss_sum, weight_sum, metrics, gradients

The gradients are taken *inside* the traced function, so the graph holds the backward of the chosen parameters
and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
from edgetrain.export.metrics import Metric, weighted_sum
from edgetrain.export.prepare import Prepared, plain_math
from edgetrain.protocol.manifest import TensorSpec

aten = torch.ops.aten

Decompositions = Mapping[torch._ops.OpOverload, Callable[..., Any]]  # noqa: SLF001
"""Replacement of an operator by simpler ones, as `make_fx` takes it."""


@dataclass(frozen=True)
class Problem:
    """What is to be learned: all that the functions close over."""

    prepared: Prepared
    loss: Loss
    metrics: Mapping[str, Metric]
    example: Example
    # Positive and not all alike, so that a forgotten weight shows. [B] or [B, T].
    weights: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Initial values, in manifest order."""
        return tuple(self.prepared.trainable.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `parameters`."""
        return tuple(self.prepared.trainable)

    def outputs(self, parameters: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> Any:
        """What the module returns."""
        state = dict(zip(self.names, parameters, strict=True))
        return call_module(self.prepared.module, state, self.example, inputs)

    def split(self, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Any]:
        """The input leaves, and the targets in the user's structure."""
        count = len(self.example.inputs.tensors)
        return tuple(leaves[:count]), self.example.targets.rebuild(tuple(leaves[count:]))

    def evaluate(
        self, parameters: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metric values per sample."""
        inputs, targets = self.split(leaves)
        outputs = self.outputs(parameters, inputs)
        losses = per_sample_loss(self.loss(outputs, targets), self.example).float()
        with torch.no_grad():
            values = {name: metric(outputs, targets).detach() for name, metric in self.metrics.items()}
        return losses, values


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


def trace_step(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The training step."""

    def step(parameters: Sequence[Tensor], leaves: Sequence[Tensor], weights: Tensor) -> dict[str, Tensor]:
        parameters = [parameter.detach().requires_grad_() for parameter in parameters]
        losses, values = problem.evaluate(parameters, leaves)
        gradients = _gradients(losses, parameters, weights)
        named = {f"gradients.{name}": g for name, g in zip(problem.names, gradients, strict=True)}
        return _sums(losses.detach(), values, weights) | named

    graph = _trace("step", problem, step, problem.example.leaves, decompositions)
    return replace(graph, forward=partial(trace_eval, problem))


def trace_eval(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The step without gradients."""

    def evaluate(
        parameters: Sequence[Tensor], leaves: Sequence[Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            losses, values = problem.evaluate(parameters, leaves)
            return _sums(losses, values, weights)

    return _trace("eval", problem, evaluate, problem.example.leaves, decompositions)


def trace_infer(problem: Problem, decompositions: Decompositions) -> TracedGraph:
    """The module alone."""

    def infer(parameters: Sequence[Tensor], leaves: Sequence[Tensor], _weights: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return flatten_outputs(problem.outputs(parameters, tuple(leaves)))

    return _trace("infer", problem, infer, problem.example.inputs.tensors, decompositions)


def _gradients(losses: Tensor, parameters: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    if not losses.requires_grad:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(
        losses, parameters, grad_outputs=weights, allow_unused=True, materialize_grads=True
    )


def _sums(losses: Tensor, values: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    metrics = {f"metrics.{name}": weighted_sum(value, weights) for name, value in values.items()}
    return {"loss_sum": (losses * weights).sum(), "weight_sum": weights.sum(), **metrics}


def _trace(
    name: str,
    problem: Problem,
    function: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], dict[str, Tensor]],
    leaves: Sequence[Tensor],
    decompositions: Decompositions,
) -> TracedGraph:
    P = len(problem.parameters)
    outputs: dict[str, Tensor] = {}

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs.clear()
        outputs.update(function(tensors[:P], tensors[P:-1], tensors[-1]))
        return tuple(outputs.values())

    values = (*problem.parameters, *leaves, problem.weights)
    names = (
        *(f"parameters.{parameter}" for parameter in problem.names),
        *problem.example.leaf_names[: len(leaves)],
        WEIGHTS,
    )
    with plain_math():
        module = make_fx(flat, decomposition_table=dict(decompositions))(*values)
    _name_constants(module, problem.prepared)
    _simplify(module)
    kept = _drop_unused_leaves(module, P)
    return TracedGraph(
        name=name,
        module=module,
        inputs=tuple(tensor_spec(names[i], values[i]) for i in kept),
        outputs=tuple(tensor_spec(key, value) for key, value in outputs.items()),
        example=tuple(values[i] for i in kept),
    )


def _name_constants(module: fx.GraphModule, prepared: Prepared) -> None:
    """Gives captured frozen tensors the names that they have in the user's module."""
    names = {
        id(tensor): name
        for name, tensor in (*prepared.module.named_parameters(), *prepared.module.named_buffers())
    }
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        label = names.get(id(tensor))
        if label is None:
            continue
        attribute = "frozen_" + label.replace(".", "_")
        while hasattr(module, attribute) and getattr(module, attribute) is not tensor:
            attribute += "_"
        if not hasattr(module, attribute):
            module.register_buffer(attribute, tensor.detach())
        names[id(getattr(module, attribute))] = label
        node.target = attribute


def _simplify(module: fx.GraphModule) -> None:
    """Removes aliases and dead code, and gives every output a node of its own."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    output = graph.output_node()
    results = list(output.args[0])
    seen: set[fx.Node] = set()
    for index, result in enumerate(results):
        if result.op != "call_function" or result in seen:
            with graph.inserting_before(output):
                results[index] = graph.call_function(aten.clone.default, (result,))
        seen.add(result)
    output.args = (tuple(results),)
    graph.eliminate_dead_code()
    module.recompile()


def _drop_unused_leaves(module: fx.GraphModule, num_parameters: int) -> list[int]:
    """Erases placeholders of batch leaves that nothing reads. Returns the indices of those that stay."""
    kept = []
    for index, node in enumerate(n for n in list(module.graph.nodes) if n.op == "placeholder"):
        if node.users or index < num_parameters:
            kept.append(index)
        else:
            module.graph.erase_node(node)
    module.recompile()
    return kept

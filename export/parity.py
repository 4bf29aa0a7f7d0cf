"""The proof: the lowered graph's numbers against eager torch, parameter by parameter.

Eager is an independent computation: the ordinary module, called and differentiated by autograd, not the trace.
Two points are compared, the initial parameters and a neighbour of them, because a fresh model may be degenerate
(zero-initialised layers, symmetric biases) and hide a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgetrain.export.batch import flatten_outputs
from edgetrain.export.errors import ParityError
from edgetrain.export.joint import Problem, TracedGraph
from edgetrain.export.lowering.base import Array, Run
from edgetrain.export.metrics import weighted_sum
from edgetrain.export.prepare import plain_math

# Largest error of a tensor, as a share of its largest element.
TOLERANCE = 1e-4
# A gradient that is mathematically zero (the key bias of attention) is rounding noise on both sides: errors
# below this share of the largest gradient of the whole model do not count.
FLOOR = 1e-6
# Size of the step to the neighbour, relative to the root mean square of each tensor.
NUDGE = 0.05
# An activation that is zero but for rounding lies on the kink of a relu, where no two machines need agree. So
# what eager torch's own gradient moves when the parameters move by this share is no error.
JITTER = 1e-6


@dataclass(frozen=True)
class Reference:
    """What eager torch computes at one point."""

    parameters: tuple[Tensor, ...]
    loss_sum: float
    weight_sum: float
    metrics: dict[str, Array]
    gradients: dict[str, Array]
    outputs: dict[str, Array]
    # By how much any element of a gradient moves with the parameters' rounding.
    moves: dict[str, float]


@dataclass(frozen=True)
class ParityReport:
    """The largest errors that were seen, each relative to the largest element of its tensor."""

    runtime: str
    loss: float
    gradient: float
    # The parameter with the largest gradient error.
    worst: str


def reference(problem: Problem, parameters: Sequence[Tensor]) -> Reference:
    """Loss, metrics, gradients and outputs by eager torch."""
    variables = tuple(parameter.detach().clone().requires_grad_() for parameter in parameters)
    with plain_math():
        losses, values = problem.evaluate(variables, problem.example.leaves)
        loss_sum = (losses * problem.weights).sum()
        gradients: Sequence[Tensor] = [torch.zeros_like(variable) for variable in variables]
        if loss_sum.requires_grad:
            gradients = torch.autograd.grad(loss_sum, variables, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            outputs = flatten_outputs(problem.outputs(parameters, problem.example.inputs.tensors))
    moved = _moves(problem, parameters, gradients)
    return Reference(
        parameters=tuple(parameter.detach() for parameter in parameters),
        loss_sum=float(loss_sum.detach()),
        weight_sum=float(problem.weights.sum()),
        metrics={name: weighted_sum(value, problem.weights).numpy() for name, value in values.items()},
        gradients={name: g.numpy() for name, g in zip(problem.names, gradients, strict=True)},
        outputs={name: value.numpy() for name, value in outputs.items()},
        moves=dict(zip(problem.names, moved, strict=True)),
    )


def _moves(problem: Problem, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[float]:
    """The largest change of each gradient when all parameters are off by `JITTER`, to either side."""
    generator = torch.Generator().manual_seed(1)
    directions = [JITTER * _scale(p) * torch.randn(p.shape, generator=generator) for p in parameters]
    moves = [0.0] * len(parameters)
    for sign in (1, -1):
        variables = [
            (p + sign * direction).requires_grad_()
            for p, direction in zip(parameters, directions, strict=True)
        ]
        with plain_math():
            losses, _ = problem.evaluate(variables, problem.example.leaves)
            if not losses.requires_grad:
                continue
            other = torch.autograd.grad(
                losses, variables, grad_outputs=problem.weights, allow_unused=True, materialize_grads=True
            )
        for i, (gradient, moved) in enumerate(zip(gradients, other, strict=True)):
            if gradient.numel():
                moves[i] = max(moves[i], float((gradient - moved).abs().max()))
    return moves


def _scale(parameter: Tensor) -> float:
    return max(float(parameter.square().mean().sqrt()), 0.1)


def points(problem: Problem) -> tuple[Reference, Reference]:
    """The references at the initial parameters and at a fixed neighbour."""
    generator = torch.Generator().manual_seed(0)
    neighbour = []
    for parameter in problem.parameters:
        neighbour.append(parameter + NUDGE * _scale(parameter) * torch.randn(parameter.shape, generator=generator))
    return reference(problem, problem.parameters), reference(problem, neighbour)


def check_finite(problem: Problem, expected: Reference) -> None:
    """Refuses a model whose loss or gradients are not finite on the example batch.

    Raises:
        ParityError: naming the parameter.
    """
    bad = [name for name, gradient in expected.gradients.items() if not np.isfinite(gradient).all()]
    if not np.isfinite(expected.loss_sum) or bad:
        what = f"the gradient of {bad[0]}" if np.isfinite(expected.loss_sum) else "the loss"
        raise ParityError(
            f"{what} is not finite on the example batch in eager torch already: check the loss, the data "
            f"(values of {', '.join(problem.example.leaf_names)}) and the initial parameters"
        )


def prove_step(
    runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: Sequence[Reference]
) -> ParityReport:
    """Compares the step at every point.

    Raises:
        ParityError: naming the parameter (or the loss, or the metric) with the largest error.
    """
    loss_error, worst, worst_error = 0.0, problem.names[0], 0.0
    for point in expected:
        got = _run(problem, graph, run, point)
        loss_error = max(loss_error, _prove_sums(runtime, "step", problem, got, point))
        floor = FLOOR * max(float(np.abs(g).max(initial=0)) for g in point.gradients.values())
        errors = {}
        for name, gradient in point.gradients.items():
            largest = float(np.abs(gradient).max(initial=0))
            difference = float(np.abs(got[f"gradients.{name}"] - gradient).max(initial=0))
            moves = point.moves[name] if np.isfinite(point.moves[name]) else 0.0
            if not difference <= TOLERANCE * largest + floor + moves:
                errors[name] = difference / max(largest, 1e-30)
            if largest > floor / TOLERANCE and difference / largest > worst_error:
                worst, worst_error = name, difference / largest
        if errors:
            name = max(errors, key=lambda key: errors[key] if np.isfinite(errors[key]) else np.inf)
            raise ParityError(
                f"{runtime}: the exported gradient of {name!r} differs from eager torch by {errors[name]:.1e} "
                f"of its largest element (allowed {TOLERANCE:.0e}); {len(errors)} of {len(point.gradients)} "
                "parameters differ. No bundle was written. Freeze that parameter, or report the module it "
                "belongs to"
            )
    return ParityReport(runtime, loss_error, worst_error, worst)


def prove_eval(runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: Reference) -> None:
    """Compares loss and metrics of the eval graph.

    Raises:
        ParityError: one of them differs.
    """
    _prove_sums(runtime, "eval", problem, _run(problem, graph, run, expected), expected)


def prove_infer(runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: Reference) -> None:
    """Compares the module's outputs.

    Raises:
        ParityError: naming the output.
    """
    got = _run(problem, graph, run, expected)
    for name, value in expected.outputs.items():
        largest = float(np.abs(value.astype(np.float64)).max(initial=0))
        difference = float(np.abs(got[name].astype(np.float64) - value.astype(np.float64)).max(initial=0))
        if not difference <= TOLERANCE * max(largest, 1e-2):
            raise ParityError(
                f"{runtime}: output {name!r} of graph 'infer' differs from eager torch by {difference:.1e} "
                f"(largest element {largest:.1e}). No bundle was written"
            )


def _run(problem: Problem, graph: TracedGraph, run: Run, point: Reference) -> dict[str, Array]:
    count = len(problem.names)
    tensors = (*point.parameters, *graph.example[count:])
    arrays = run([np.ascontiguousarray(tensor.numpy()) for tensor in tensors])
    for spec, array in zip(graph.outputs, arrays, strict=True):
        if tuple(array.shape) != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise ParityError(
                f"output {spec.name!r} of graph {graph.name!r} came out as {array.dtype} {array.shape}, "
                f"expected {spec.dtype} {spec.shape}. No bundle was written"
            )
    return {spec.name: array for spec, array in zip(graph.outputs, arrays, strict=True)}


def _prove_sums(
    runtime: str, graph: str, problem: Problem, got: dict[str, Array], expected: Reference
) -> float:
    wanted = {"loss_sum": np.asarray(expected.loss_sum), "weight_sum": np.asarray(expected.weight_sum)}
    wanted |= {f"metrics.{name}": expected.metrics[name] for name in problem.metrics}
    for name, value in wanted.items():
        error = float(np.abs(got[name] - value).max())
        if not error <= TOLERANCE * max(float(np.abs(value).max()), 1.0):
            raise ParityError(
                f"{runtime}: {name} of graph {graph!r} is {got[name]}, eager torch gives {value}. "
                "No bundle was written"
            )
    return float(abs(got["loss_sum"] - expected.loss_sum)) / max(abs(expected.loss_sum), 1e-30)

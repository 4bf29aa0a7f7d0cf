"""The proof: the lowered graph's numbers against eager torch, parameter by parameter.

Eager is an independent computation: the ordinary module, called and differentiated by autograd, not the
trace. Two points are compared, the initial parameters and a neighbour of them, because a fresh model may be
degenerate (zero-initialised layers, symmetric biases) and hide a wrong gradient. A point that seems to lie on the
kink of an activation is replaced by two close to it; a wrong gradient is wrong there, too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgetrain.export.batch import flatten_outputs
from edgetrain.export.errors import GradientError, ParityError
from edgetrain.export.graph.joint import Problem, TracedGraph
from edgetrain.export.lowering.base import Run
from edgetrain.export.metrics import weighted_sum
from edgetrain.export.prepare import plain_math
from edgetrain.export.user_code import user_code
from edgetrain.protocol.graph_names import GRADIENT, METRIC

logger = logging.getLogger(__name__)

# Of any dtype; arithmetic between them is what this file is about.
Array = npt.NDArray[Any]

# Largest error of a tensor, as a share of its largest element.
TOLERANCE = 1e-4
# A gradient that is mathematically zero (the key bias of attention) is rounding noise on both sides: errors
# below this share of the largest gradient of the whole model do not count.
FLOOR = 1e-6
# Size of the step to the neighbour, relative to the root mean square of each tensor.
NUDGE = 0.05
# Where an activation is zero but for rounding, a relu has two right gradients, and among millions of activations one
# often is (one of mobilenet-v2 is worth 1.5e-2). A point whose gradients differ by less than this share may be such a
# kink: it is passed over if they agree, as strictly, at two of eight points close by. A wrong gradient is wrong at all.
KINK = 2e-2
NEARBY = 1e-3
# The same where weights are whole numbers: every second one moves.
NEARBY_WHOLE = 2e-2
CLOSE_BY = 8
AGREEING = 2


@dataclass(frozen=True)
class Reference:
    """What eager torch computes at one point."""

    parameters: tuple[Tensor, ...]
    loss_sum: float
    weight_sum: float
    metrics: dict[str, Array]
    gradients: dict[str, Array]
    outputs: dict[str, Array]
    # Parameters that the loss does not depend on.
    unused: tuple[str, ...]


@dataclass(frozen=True)
class ClippedReference:
    """The same with per-sample clipping: `sums.gradients` are sums of clipped gradients."""

    sums: Reference
    # Before clipping, [B].
    norms: Array


@dataclass(frozen=True)
class Expected:
    """What eager torch computes at all points that are compared."""

    initial: Reference
    neighbour: Reference
    # At the neighbour, if the graph is asked for.
    clipped: ClippedReference | None


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
    with plain_math(problem.prepared.module):
        evaluation = problem.evaluate(variables, problem.example.leaves, problem.weights)
        loss_sum = (evaluation.losses * evaluation.weights).sum()
        found: Sequence[Tensor | None] = [None] * len(variables)
        if loss_sum.requires_grad:
            with user_code("differentiating the loss in eager torch"):
                found = torch.autograd.grad(loss_sum, variables, allow_unused=True)
        gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]
        with torch.no_grad():
            outputs = flatten_outputs(problem.merged_outputs(parameters, problem.example.inputs.tensors))
    return Reference(
        parameters=tuple(parameter.detach() for parameter in parameters),
        loss_sum=float(loss_sum.detach()),
        weight_sum=float(evaluation.weights.sum()),
        metrics={name: weighted_sum(value, evaluation.weights).numpy() for name, value in evaluation.values.items()},
        gradients={name: g.numpy() for name, g in zip(problem.names, gradients, strict=True)},
        outputs={name: value.numpy() for name, value in outputs.items()},
        unused=tuple(name for name, g in zip(problem.names, found, strict=True) if g is None),
    )


def expectations(problem: Problem, *, clipping: bool) -> tuple[Problem, Expected]:
    """The references at the initial parameters and at a fixed neighbour.

    Returns:
        The problem, with a clip norm that clips half of the samples if `clipping`; and the references.
    """
    generator = torch.Generator().manual_seed(0)
    neighbour = problem.representable([_nudged(parameter, NUDGE, generator) for parameter in problem.parameters])
    initial, near = reference(problem, problem.parameters), reference(problem, neighbour)
    if not clipping:
        return problem, Expected(initial, near, None)
    clip_norm, clipped = _clipped_reference(problem, near)
    return replace(problem, clip_norm=clip_norm), Expected(initial, near, clipped)


def _nudged(parameter: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A parameter and noise of that share of its root mean square."""
    scale = share * max(float(parameter.square().mean().sqrt()), 0.1)
    return parameter + scale * torch.randn(parameter.shape, generator=generator)


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
    runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: Expected, *, kinks: bool = False
) -> ParityReport:
    """Compares the step at every point.

    Args:
        runtime: for messages.
        problem: what was exported.
        graph: the traced step.
        run: the lowered step.
        expected: what is right.
        kinks: pass over points at which eager torch's gradients are not the only right ones, see `KINK`.

    Raises:
        ParityError: naming the parameter (or the loss, or the metric) with the largest error.
    """
    loss_error, worst, worst_error = 0.0, problem.names[0], 0.0
    for point in (expected.initial, expected.neighbour):
        try:
            shown = [_prove_point(runtime, problem, graph, run, point)]
        except GradientError as error:
            if not (kinks and error.share <= KINK):
                raise
            shown = _prove_close_by(runtime, problem, graph, run, point)
            if len(shown) < AGREEING:
                raise
            logger.warning(
                "%s: a gradient differs by %.1e of its largest element at one point, as on the kink of a relu; "
                "close by, all agree",
                runtime,
                error.share,
            )
        for loss, name, share in shown:
            loss_error = max(loss_error, loss)
            if share > worst_error:
                worst, worst_error = name, share
    return ParityReport(runtime, loss_error, worst_error, worst)


def _prove_point(
    runtime: str, problem: Problem, graph: TracedGraph, run: Run, point: Reference
) -> tuple[float, str, float]:
    """The error of the loss, the worst parameter, and the error of its gradient."""
    got = _run(problem, graph, run, point)
    loss = _prove_sums(runtime, graph.name, problem, got, point)
    return (loss, *_prove_gradients(runtime, problem, got, point))


def _prove_close_by(
    runtime: str, problem: Problem, graph: TracedGraph, run: Run, point: Reference
) -> list[tuple[float, str, float]]:
    """As `_prove_point`, of points close to the given one that agree; at most `AGREEING`."""
    agreeing = []
    for seed in range(CLOSE_BY):
        generator = torch.Generator().manual_seed(seed)
        share = NEARBY_WHOLE if problem.int8 else NEARBY
        nudged = problem.representable([_nudged(parameter, share, generator) for parameter in point.parameters])
        near = reference(problem, nudged)
        with contextlib.suppress(GradientError):
            agreeing.append(_prove_point(runtime, problem, graph, run, near))
        if len(agreeing) == AGREEING:
            break
    return agreeing


def _prove_gradients(runtime: str, problem: Problem, got: dict[str, Array], point: Reference) -> tuple[str, float]:
    """The parameter with the largest relative error, and that error."""
    floor = FLOOR * max(float(np.abs(g).max(initial=0)) for g in point.gradients.values())
    relative: dict[str, float] = {}
    wrong: dict[str, float] = {}
    for name, gradient in point.gradients.items():
        largest = float(np.abs(gradient).max(initial=0))
        difference = float(np.abs(got[f"{GRADIENT}{name}"] - gradient).max(initial=0))
        if not difference <= TOLERANCE * largest + floor:
            wrong[name] = difference
        if largest > floor / TOLERANCE:
            relative[name] = difference / largest
    if wrong:
        shares = {n: d / max(float(np.abs(point.gradients[n]).max(initial=0)), 1e-30) for n, d in wrong.items()}
        name = max(shares, key=lambda key: shares[key] if np.isfinite(shares[key]) else np.inf)
        raise GradientError(
            shares[name],
            f"{runtime}: the exported gradient of {name!r} differs from eager torch by {shares[name]:.1e} "
            f"of its largest element (allowed {TOLERANCE:.0e}); {len(wrong)} of {len(point.gradients)} "
            "parameters differ. No bundle was written. Freeze that parameter, or report the module it "
            "belongs to",
        )
    return max(relative.items(), key=lambda item: item[1], default=(problem.names[0], 0.0))


def _clipped_reference(problem: Problem, point: Reference) -> tuple[Tensor, ClippedReference]:
    """A clip norm at the median, and what eager torch gives for it, sample by sample."""
    variables = tuple(parameter.detach().clone().requires_grad_() for parameter in point.parameters)
    rows = []
    with plain_math(problem.prepared.module):
        for index in range(problem.example.micro_batch):
            leaves = tuple(leaf[index : index + 1] for leaf in problem.example.leaves)
            evaluation = problem.evaluate(variables, leaves, problem.weights[index : index + 1])
            loss = (evaluation.losses * evaluation.weights).sum()
            gradients = torch.autograd.grad(loss, variables, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    samples = torch.stack(rows)
    norms = samples.norm(dim=1)
    clip_norm = norms.median() * 1.01
    flat = ((clip_norm / norms.clamp(min=1e-30)).clamp(max=1.0)[:, None] * samples).sum(0)
    parts = flat.split([variable.numel() for variable in variables])
    sums = {
        name: part.reshape(variable.shape).numpy()
        for name, part, variable in zip(problem.names, parts, variables, strict=True)
    }
    return clip_norm, ClippedReference(replace(point, gradients=sums), norms.numpy())


def observe(problem: Problem, graph: TracedGraph, run: Run, point: Reference) -> Reference:
    """What a run of a graph gives at a point, as a reference for others; what the graph has no output for is kept."""
    got = _run(problem, graph, run, point)
    return replace(
        point,
        loss_sum=float(got.get("loss_sum", point.loss_sum)),
        weight_sum=float(got.get("weight_sum", point.weight_sum)),
        metrics={name: got.get(f"{METRIC}{name}", value) for name, value in point.metrics.items()},
        gradients={name: got.get(f"{GRADIENT}{name}", value) for name, value in point.gradients.items()},
        outputs={name: got.get(name, value) for name, value in point.outputs.items()},
    )


def prove_clipped(runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: ClippedReference) -> None:
    """Compares the step with per-sample clipping.

    Raises:
        ParityError: as `prove_step`.
    """
    got = _run(problem, graph, run, expected.sums)
    norms = expected.norms
    _prove_sums(runtime, graph.name, problem, got, expected.sums)
    _prove_gradients(runtime, problem, got, expected.sums)
    difference = np.abs(got["norms"] - norms).max()
    if not difference <= TOLERANCE * np.abs(norms).max():
        raise ParityError(
            f"{runtime}: the per-sample gradient norms are {got['norms']}, eager torch gives {norms}. "
            "No bundle was written"
        )


def prove_eval(runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: Expected) -> None:
    """Compares loss and metrics of the eval graph.

    Raises:
        ParityError: one of them differs.
    """
    _prove_sums(runtime, graph.name, problem, _run(problem, graph, run, expected.neighbour), expected.neighbour)


def prove_infer(runtime: str, problem: Problem, graph: TracedGraph, run: Run, expected: Expected) -> None:
    """Compares the module's outputs.

    Raises:
        ParityError: naming the output.
    """
    got = _run(problem, graph, run, expected.neighbour)
    for name, value in expected.neighbour.outputs.items():
        if wrong := wrong_output(got[name], value):
            difference, largest = wrong
            raise ParityError(
                f"{runtime}: output {name!r} of graph 'infer' differs from eager torch by {difference:.1e} "
                f"(largest element {largest:.1e}). No bundle was written"
            )


def wrong_output(got: Array, expected: Array) -> tuple[float, float] | None:
    """The largest difference of an output, and its largest element; None if it is no more than rounding."""
    largest = float(np.abs(expected.astype(np.float64)).max(initial=0))
    difference = float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max(initial=0))
    if difference <= TOLERANCE * max(largest, 1e-2):
        return None
    return difference, largest


def _run(problem: Problem, graph: TracedGraph, run: Run, point: Reference) -> dict[str, Array]:
    count = len(problem.names)
    tensors = (*point.parameters, *graph.example[count:])
    arrays = run([np.asarray(tensor.numpy(), order="C") for tensor in tensors])
    for spec, array in zip(graph.outputs, arrays, strict=True):
        if tuple(array.shape) != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise ParityError(
                f"output {spec.name!r} of graph {graph.name!r} came out as {array.dtype} {array.shape}, "
                f"expected {spec.dtype} {spec.shape}. No bundle was written"
            )
    return {spec.name: array for spec, array in zip(graph.outputs, arrays, strict=True)}


def _prove_sums(runtime: str, graph: str, problem: Problem, got: dict[str, Array], expected: Reference) -> float:
    wanted = {"loss_sum": np.asarray(expected.loss_sum), "weight_sum": np.asarray(expected.weight_sum)}
    wanted |= {f"{METRIC}{name}": expected.metrics[name] for name in problem.metrics}
    for name, value in wanted.items():
        error = float(np.abs(got[name] - value).max())
        if not error <= TOLERANCE * max(float(np.abs(value).max()), 1.0):
            raise ParityError(
                f"{runtime}: {name} of graph {graph!r} is {got[name]}, eager torch gives {value}. No bundle was written"
            )
    return float(abs(got["loss_sum"] - expected.loss_sum)) / max(abs(expected.loss_sum), 1e-30)

"""One runtime's program with its frozen weights in fewer bytes.

The traced step is proven against eager torch first, as it is. Then its frozen weights are rounded, and the lowered
programs are proven against the rounded graphs in torch, fed with the features that the lowered trunk gives. What
rounding costs is measured, not proven: the change of the loss on the calibration data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from edgetrain.export import parity
from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph import joint
from edgetrain.export.graph.joint import Problem, TracedGraph
from edgetrain.export.graph.partition import Split, with_features
from edgetrain.export.lowering.base import Array, LoweredGraph, Lowering, Run, StoringLowering
from edgetrain.export.parity import Expected, Reference
from edgetrain.export.program import Translator, graph_entry, split_problem
from edgetrain.export.relative_error import relative_error
from edgetrain.export.storage.calibration import Batch
from edgetrain.export.storage.frozen_weights import is_weight, rounded
from edgetrain.export.storage.settings import TRUNK_KINDS, Storage
from edgetrain.protocol.graph_names import FEATURE
from edgetrain.protocol.manifest import Graph, Program, StorageReport

logger = logging.getLogger(__name__)

# The features of the example batch may be off by this share, or so many times as much as those of the calibration data,
# before it is said.
_OFF, _UNLIKE = 0.05, 2.0


@dataclass(frozen=True)
class StoredProgram:
    """What `make_stored_program` gives."""

    program: Program
    # What torch computes for the rounded graphs at the initial parameters.
    expected: Reference
    notes: tuple[str, ...]
    # Frozen tensors that are stored in fewer bytes, and as what.
    quantized: dict[str, str]


def make_stored_program(
    lowering: Lowering,
    problem: Problem,
    expected: Expected,
    files: dict[str, bytes],
    storage: Storage,
    calibration: Sequence[Batch],
) -> StoredProgram:
    """All graphs of one runtime; their files are added to `files`.

    Raises:
        UnsupportedError: an operator that cannot be exported, or nothing that this kind of storage could take.
        ToleranceError: rounding changes the loss by more than is allowed.
        ParityError: a graph computes other numbers than torch.
    """
    if not isinstance(lowering, StoringLowering):
        raise UnsupportedError(
            f"runtime {lowering.runtime!r} stores frozen weights as float32 only, not {storage.kind}"
        )
    maker = _Maker(lowering, problem, storage, files)
    translator = Translator(lowering, problem)
    step = translator.trace(joint.trace_step)
    parity.prove_step(f"{lowering.runtime} (before rounding)", problem, step, torch_run(step), expected)
    parts = split_problem(step, problem)
    if parts is None and storage.kind in TRUNK_KINDS:
        raise UnsupportedError(
            f"{storage.kind} quantizes the trunk, but nothing worth a trunk is frozen: use int8, which stores weights"
        )
    if parts is None:
        cost = maker.write_whole(step, translator.trace(joint.trace_eval), expected, calibration)
    else:
        cost = maker.write_parts(parts, expected, calibration)
    maker.write(translator.trace(joint.trace_infer), expected)
    report = StorageReport(
        kind=storage.kind,
        bytes_before=maker.bytes_before,
        bytes_after=maker.bytes_after,
        trunk_bytes_before=maker.trunk_bytes[0],
        trunk_bytes_after=maker.trunk_bytes[1],
        calibration_samples=len(calibration) * problem.example.micro_batch,
        loss_before=cost.loss_before,
        loss_after=cost.loss_after,
        feature_error=cost.feature_error if storage.kind in TRUNK_KINDS else None,
    )
    storage.check_loss(
        f"frozen weights as {storage.kind}",
        cost.loss_before,
        cost.loss_after,
        "Use float16, give calibration data like the devices', or allow more",
    )
    logger.info(
        f"{storage.kind}: {maker.bytes_before:,} -> {maker.bytes_after:,} bytes, "
        f"loss {cost.loss_before:.5g} -> {cost.loss_after:.5g}"
    )
    assert maker.reference is not None
    program = Program(
        runtime=lowering.runtime,
        minimum_version=lowering.minimum_version,
        graphs=maker.graphs,
        storage=report,
    )
    large = [name for name, tensor in problem.prepared.frozen.items() if is_weight(tensor)]
    return StoredProgram(program, maker.reference, cost.notes, lowering.stored_as(large, storage.kind, parts))


@dataclass(frozen=True)
class _Cost:
    """What storing changes on the calibration data."""

    # Mean losses.
    loss_before: float
    loss_after: float
    # Root mean square of the change of the trunk's features, relative to them; None without a trunk.
    feature_error: float | None = None
    # For the user to read.
    notes: tuple[str, ...] = ()


class _Maker:
    """Rounds, lowers, stores and proves graph by graph, and counts bytes."""

    def __init__(self, lowering: StoringLowering, problem: Problem, storage: Storage, files: dict[str, bytes]) -> None:
        self._lowering = lowering
        self._problem = problem
        self._storage = storage
        self._files = files
        self.graphs: dict[str, Graph] = {}
        self.bytes_before = self.bytes_after = 0
        self.trunk_bytes = (0, 0)
        self.reference: Reference | None = None

    def write(self, graph: TracedGraph, expected: Expected) -> Run:
        """One graph that is not the trunk, proven against itself in torch."""
        weights = self._lowering.weights(self._storage.kind)
        if weights != "float32":
            graph = rounded(graph, weights)
        lowered = self._lowering.lower(graph)
        stored = self._lowering.store(lowered, weights)
        run = self._lowering.load(stored)
        points = (expected.initial, expected.neighbour)
        initial, near = (parity.observe(self._problem, graph, torch_run(graph), point) for point in points)
        observed = Expected(initial, near, None)
        if graph.name in ("step", "head_step"):
            parity.prove_step(self._lowering.runtime, self._problem, graph, run, observed)
            self.reference = initial
        elif graph.name == "infer":
            parity.prove_infer(self._lowering.runtime, self._problem, graph, run, observed)
        else:
            parity.prove_eval(self._lowering.runtime, self._problem, graph, run, observed)
        self._add(graph, stored, len(lowered.data))
        return run

    def write_whole(
        self, step: TracedGraph, evaluation: TracedGraph, expected: Expected, calibration: Sequence[Batch]
    ) -> _Cost:
        """Step and eval of a program that is not split."""
        before = _mean_loss(self._problem, calibration, torch_run(evaluation), evaluation)
        self.write(step, expected)
        run = self.write(evaluation, expected)
        return _Cost(before, _mean_loss(self._problem, calibration, run, evaluation))

    def write_parts(self, parts: Split, expected: Expected, calibration: Sequence[Batch]) -> _Cost:
        """Trunk and head."""
        problem, plain = self._problem, torch_run(parts.trunk)
        trunk = self._write_trunk(parts.trunk, calibration)
        example = [tensor.numpy() for tensor in parts.trunk.example]
        features = trunk(example)
        self.write(with_features(parts.head_step, features), expected)
        evaluate = self.write(with_features(parts.head_eval, features), expected)
        leaves = [_leaves(problem, parts.trunk, batch) for batch in calibration]
        exact, stored = ([run(batch) for batch in leaves] for run in (plain, trunk))
        before = _mean_loss(problem, calibration, torch_run(parts.head_eval), parts.head_eval, exact)
        after = _mean_loss(problem, calibration, evaluate, parts.head_eval, stored)
        error = relative_error(chain.from_iterable(stored), chain.from_iterable(exact))
        return _Cost(before, after, error, _unlike(error, relative_error(features, plain(example))))

    def _write_trunk(self, trunk: TracedGraph, calibration: Sequence[Batch]) -> Run:
        kind = self._storage.kind
        if kind in TRUNK_KINDS:
            lowered = self._lowering.lower(trunk)
            batches = [_leaves(self._problem, trunk, batch) for batch in calibration]
            stored = self._lowering.quantize_trunk(trunk, lowered, kind, batches)
        else:
            lowered = self._lowering.lower(rounded(trunk, kind))
            stored = self._lowering.store(lowered, kind)
        self.trunk_bytes = len(lowered.data), len(stored.data)
        self._add(trunk, stored, len(lowered.data))
        return self._lowering.load(stored)

    def _add(self, graph: TracedGraph, stored: LoweredGraph, before: int) -> None:
        self.graphs[graph.name] = graph_entry(self._lowering.runtime, graph, stored, self._files)
        self.bytes_before += before
        self.bytes_after += len(stored.data)


def torch_run(graph: TracedGraph) -> Run:
    """A traced graph run by torch."""

    def run(arrays: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            return [value.numpy() for value in graph.module(*(torch.from_numpy(np.asarray(a)) for a in arrays))]

    return run


def _leaves(problem: Problem, graph: TracedGraph, batch: Batch) -> list[Array]:
    """The batch leaves that a graph takes, in its order."""
    named = dict(zip(problem.example.leaf_names, batch, strict=True))
    named["weights"] = torch.ones_like(problem.weights)
    return [np.ascontiguousarray(named[spec.name].numpy()) for spec in graph.inputs if spec.name in named]


def _mean_loss(
    problem: Problem, batches: Sequence[Batch], run: Run, graph: TracedGraph, features: Sequence[list[Array]] = ()
) -> float:
    """Over the batches; a graph that takes features is given these of each."""
    parameters = [parameter.numpy() for parameter in problem.parameters]
    losses = weights = 0.0
    for batch, given in zip(batches, features or [[]] * len(batches), strict=True):
        assert len(given) == sum(spec.name.startswith(FEATURE) for spec in graph.inputs)
        sums = run([*parameters, *given, *_leaves(problem, graph, batch)])
        losses += float(sums[0])
        weights += float(sums[1])
    return losses / weights if weights else losses


def _unlike(calibration: float, example: float) -> tuple[str, ...]:
    if example <= max(_OFF, _UNLIKE * calibration):
        return ()
    shares = f"its features are off by {example:.1%}, those of the calibration data by {calibration:.1%}"
    return (f"the calibration data are not like the example batch: {shares}",)

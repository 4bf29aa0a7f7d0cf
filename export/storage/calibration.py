"""The data that ranges and loss changes are measured on, in micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edgetrain.export.batch import read_example
from edgetrain.export.errors import BatchError
from edgetrain.export.graph.joint import Problem
from edgetrain.export.storage.settings import Storage

Batch = tuple[Tensor, ...]
"""One micro-batch of calibration data: the leaves of the inputs, then of the targets."""


@dataclass(frozen=True)
class Calibration:
    """What was given, or the example batch."""

    batches: tuple[Batch, ...]
    # For the user to read.
    notes: tuple[str, ...]


def calibration_data(problem: Problem, storage: Storage) -> Calibration:
    """Whole micro-batches of what the user gave; what is left over is not used.

    Raises:
        BatchError: it does not fit the example batch.
    """
    example = problem.example
    if storage.calibration is None:
        kinds = [storage.kind] if storage.kind != "float32" else []
        kinds += ["trainable int8"] if storage.trainable == "int8" else []
        samples = f"the {example.micro_batch} samples of the example"
        note = f"no calibration data: {' and '.join(kinds)} was measured on {samples}"
        return Calibration((example.leaves,), (note,) if kinds else ())
    given = read_example(storage.calibration, None)
    for mine, theirs in ((example.inputs, given.inputs), (example.targets, given.targets)):
        if mine.leaf_names != theirs.leaf_names:
            raise BatchError(f"calibration data: {theirs.leaf_names}, but the example batch has {mine.leaf_names}")
        for name, leaf, other in zip(mine.leaf_names, mine.tensors, theirs.tensors, strict=True):
            if leaf.shape[1:] != other.shape[1:] or leaf.dtype != other.dtype:
                raise BatchError(
                    f"calibration data: {name} is {other.dtype} {list(other.shape)}, the example batch has "
                    f"{leaf.dtype} {list(leaf.shape)}"
                )
    size, count = example.micro_batch, given.micro_batch
    if count < size:
        given = read_example(storage.calibration, size)
    starts = range(0, max(count - size, 0) + 1, size)
    return Calibration(tuple(tuple(leaf[i : i + size] for leaf in given.leaves) for i in starts), ())

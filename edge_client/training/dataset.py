"""A data set in memory (or memory-mapped), in the structure of the bundle's example batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.host.memory import MappedRows
from edgetrain.edge_client.runtimes.base import Batch, Half
from edgetrain.edge_client.runtimes.leaves import (
    Array,
    check_dtype,
    check_finite,
    check_shape,
    flatten,
    halves,
)
from edgetrain.protocol.manifest import BatchSpec, TensorSpec

# Bytes looked at together, so that a memory-mapped array is never in memory whole.
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples along dimension 0 of every array."""

    inputs: Half
    targets: Half
    # float [N], or [N, T] where the loss is per token; None for ones.
    weights: Array | None = None
    # Changes the inputs of a batch anew whenever it is trained on (crops, flips, noise), or None. It must keep
    # structure, shapes and dtypes. Evaluation leaves it out.
    augment: Callable[[Half, np.random.Generator], Half] | None = None
    # Which samples of the arrays these are, int64 [N]; None for all. They are copied when they are taken, not before.
    chosen: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Number of samples."""
        if self.chosen is not None:
            return len(self.chosen)
        first = self.inputs
        if isinstance(first, Mapping):
            first = next(iter(first.values()))
        elif not isinstance(first, np.ndarray):
            first = first[0]
        return len(first)

    def take(self, indices: npt.NDArray[np.int64]) -> tuple[Batch, npt.NDArray[np.float32] | None]:
        """The samples at `indices`, as `(batch, weights)`: the arguments of `Session.step`."""
        part = self.subset(indices)
        weights = None if part.weights is None else part.weights.astype(np.float32)
        return (part.inputs, part.targets), weights

    def subset(self, indices: npt.NDArray[np.int64]) -> Dataset:
        """The samples at `indices`, copied."""
        rows = self.rows(indices)
        return Dataset(
            map_half(lambda array: _taken(array, rows), self.inputs),
            map_half(lambda array: _taken(array, rows), self.targets),
            None if self.weights is None else _taken(self.weights, rows),
            self.augment,
        )

    def select(self, indices: npt.NDArray[np.int64]) -> Dataset:
        """The samples at `indices`, not copied: memory-mapped arrays stay on the disk."""
        return replace(self, chosen=self.rows(indices))

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the samples at `indices` are in the arrays."""
        return indices if self.chosen is None else self.chosen[indices]

    def augmented(self, rng: np.random.Generator) -> Dataset:
        """The same samples, changed anew by `augment` whenever they are taken."""
        return _Augmented(self.inputs, self.targets, self.weights, self.augment, self.chosen, rng=rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Augmented(Dataset):
    rng: np.random.Generator

    def take(self, indices: npt.NDArray[np.int64]) -> tuple[Batch, npt.NDArray[np.float32] | None]:
        # Not super(): a dataclass with slots is another class than the one that the call would look for.
        (inputs, targets), weights = Dataset.take(self, indices)
        assert self.augment is not None
        return (self.augment(inputs, self.rng), targets), weights


def pieces(array: Array) -> Iterator[tuple[int, Array]]:
    """An array some rows at a time, with the number of the first; a memory-mapped one does not stay in memory."""
    count = max(1, _PIECE // max(1, array.nbytes // max(1, len(array))))
    for first in range(0, len(array), count):
        yield first, _taken(array, np.arange(first, min(first + count, len(array))))


def check_dataset(dataset: Dataset, batch: BatchSpec, where: str = "") -> Dataset:
    """Checks every sample against the manifest.

    Args:
        dataset: what to check.
        batch: `manifest.batch` of the bundle that will train on it.
        where: prefix of messages, e.g. "data.npz: ".

    Returns:
        The same data set.

    Raises:
        DataError: another structure, shape or dtype, unequal lengths, no samples, NaN or infinity, weights
            below 0 or all 0. Names the array, what was expected and what is there.
    """
    leaves: list[tuple[TensorSpec, Array]] = []
    for (name, structure), half in zip(halves(batch), (dataset.inputs, dataset.targets), strict=True):
        try:
            arrays = flatten(name, structure, half)
        except DataError as error:
            raise DataError(f"{where}{error}") from None
        leaves += zip(structure.leaves, arrays, strict=True)
    for spec, array in leaves:
        check_shape(spec, array, where)
    lengths = {spec.name: len(array) for spec, array in leaves}
    if dataset.weights is not None:
        _check_weights(dataset.weights, batch.weights, where)
        lengths["weights"] = len(dataset.weights)
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{where}the arrays have different numbers of samples: {found}")
    if len(dataset) == 0:
        raise DataError(f"{where}there are no samples")
    for spec, array in leaves:
        for first, rows in pieces(array):
            check_dtype(spec, rows, where)
            with np.errstate(over="ignore"):
                check_finite(spec, rows.astype(spec.dtype, copy=False), where, first)
    return dataset


def _check_weights(weights: Array, spec: TensorSpec, where: str) -> None:
    if not isinstance(weights, np.ndarray) or weights.dtype.kind not in "fiub":
        raise DataError(f"{where}weights: expected a float32 array, got {getattr(weights, 'dtype', type(weights))}")
    if weights.ndim != 1:
        check_shape(spec, weights, where)
    values = weights.astype(np.float32)
    check_finite(spec, values, where)
    if (values < 0).any() or not (values > 0).any():
        raise DataError(f"{where}weights: must be at least 0, and one of them above 0")


def map_half(function: Callable[[Array], Array], half: Half) -> Half:
    """Every array of one half of a batch, changed."""
    if isinstance(half, np.ndarray):
        return function(half)
    if isinstance(half, Mapping):
        return {key: function(array) for key, array in half.items()}
    return tuple(function(array) for array in half)


def _taken(array: Array, rows: npt.NDArray[np.int64]) -> Array:
    try:
        return array.rows(rows) if isinstance(array, MappedRows) else array[rows]
    except OSError as error:
        raise DataError(f"the local data can no longer be read: {error}") from error

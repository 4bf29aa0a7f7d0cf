"""All updates of a round side by side, for strategies that compare them, in bounded memory.

Sparse updates stay as they are; dense ones go to one anonymous temporary file once they take more than a budget.
Strategies walk over blocks of coordinates, so what is in memory is a block of all rows. The file is read, not
memory-mapped: every page of a mapping that was ever touched would count as this process's memory.
"""

from __future__ import annotations

import bisect
import functools
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.strategies.base import Contribution
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.vectors import Vector

Doubles = npt.NDArray[np.float64]

# What a sum of fixed-point numbers could not take from a client of one example either.
LARGEST = 2.0**33
# Dense updates beyond so many bytes go to temporary files.
MEMORY_BYTES = 64 << 20
# A block of all rows, as float64, takes about so much.
BLOCK_BYTES = 32 << 20
# For files that are too large for memory; they have no name there.
_DISK_FOLDER = "/var/tmp"  # noqa: S108 - nobody can guess a name that is not there


@dataclass(frozen=True, slots=True)
class _Row:
    client: str
    num_examples: int
    # In memory, or else where in the spill file.
    update: SparseOrDense | None
    position: int = 0


class UpdateTable:
    """Updates by client. Rows are in the order of the clients' names, whatever the order of arrival.

    Args:
        num_parameters: length of each.
        memory_bytes: budget for dense updates, before they go to files.
        block_bytes: size of a block.
    """

    def __init__(
        self, num_parameters: int, *, memory_bytes: int = MEMORY_BYTES, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.num_parameters = num_parameters
        self._memory_left = memory_bytes
        self._block_bytes = block_bytes
        self._rows: list[_Row] = []

    @functools.cached_property
    def _spilled(self) -> _SpillFile:
        spilled = _SpillFile()
        weakref.finalize(self, spilled.close)
        return spilled

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, contribution: Contribution) -> None:
        """Adds a row.

        Raises:
            UpdateRefused: of another length, or absurdly large. Nothing was added.
        """
        update = contribution.update
        if update.num_parameters != self.num_parameters:
            raise UpdateRefused(
                f"the update has {update.num_parameters} parameters, the model has {self.num_parameters}"
            )
        if np.max(np.abs(update.values), initial=np.float32(0)) >= LARGEST:
            raise UpdateRefused("the update's values are too large to be true")
        self._memory_left -= update.values.nbytes
        client, num_examples = contribution.client, contribution.num_examples
        if update.indices is None and self._memory_left < 0:
            row = _Row(client, num_examples, None, self._spilled.add(update.values))
        else:
            row = _Row(client, num_examples, update)
        bisect.insort(self._rows, row, key=lambda row: row.client)

    @property
    def clients(self) -> list[str]:
        """Names, in the order of the rows."""
        return [row.client for row in self._rows]

    @property
    def num_examples(self) -> Doubles:
        """Of each row, [rows]."""
        return np.array([row.num_examples for row in self._rows], np.float64)

    def blocks(self) -> Iterator[tuple[slice, Doubles]]:
        """(coordinates, their values in all rows [rows, block]), from the first to the last coordinate."""
        width = max(1, self._block_bytes // (8 * max(1, len(self._rows))))
        for start in range(0, self.num_parameters, width):
            stop = min(start + width, self.num_parameters)
            block = np.zeros((len(self._rows), stop - start))
            for values, row in zip(block, self._rows, strict=True):
                if row.update is None:
                    values[:] = self._spilled.read(row.position, start, stop)
                elif row.update.indices is None:
                    values[:] = row.update.values[start:stop]
                else:
                    first, last = np.searchsorted(row.update.indices, (start, stop))
                    values[row.update.indices[first:last] - start] = row.update.values[first:last]
            yield slice(start, stop), block

    def gram(self) -> Doubles:
        """Dot products of all rows with each other, [rows, rows]."""
        total = np.zeros((len(self._rows), len(self._rows)))
        for _, block in self.blocks():
            total += block @ block.T
        return total

    def combine(self, weights: Doubles) -> Doubles:
        """The sum of the rows times their weights, [num_parameters]."""
        combined = np.empty(self.num_parameters)
        for coordinates, block in self.blocks():
            combined[coordinates] = weights @ block
        return combined


def squared_distances(gram: Doubles) -> Doubles:
    """Between all rows, [rows, rows], from their dot products."""
    norms = np.diag(gram)
    distances: Doubles = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)
    return distances


class _SpillFile:
    """Vectors on the disk, for as long as somebody holds them."""

    def __init__(self) -> None:
        # Not /tmp where there is a choice: that may be memory itself.
        folder = _DISK_FOLDER if os.access(_DISK_FOLDER, os.W_OK) else None
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the table
        self._end = 0

    def add(self, values: Vector) -> int:
        """Appends a vector; returns where it is.

        Raises:
            RunError: the disk is full.
        """
        start, data = self._end, np.ascontiguousarray(values, dtype=np.float32).data.cast("B")
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, self._end)
                self._end, data = self._end + written, data[written:]
        except OSError as error:
            raise RunError(f"cannot keep the round's updates in a temporary file: {error}") from error
        return start

    def read(self, position: int, start: int, stop: int) -> Vector:
        """Elements of the vector at a position."""
        data = os.pread(self._file.fileno(), 4 * (stop - start), position + 4 * start)
        return np.frombuffer(data, np.float32)

    def close(self) -> None:
        """Lets go of the disk's space."""
        self._file.close()

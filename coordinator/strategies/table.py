"""All updates of a round side by side, for strategies that compare them, in bounded memory.

Sparse updates stay as they are; dense ones live in anonymous temporary files, memory-mapped, once they take
more than a budget. Strategies walk over blocks of coordinates, so what is in memory is a block of all rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.strategies.base import Contribution, Vector
from edgetrain.protocol.codecs import SparseOrDense

Doubles = npt.NDArray[np.float64]

# What a sum of fixed-point numbers could not take from a client of one example either.
LARGEST = 2.0**33
# Dense updates beyond so many bytes go to temporary files.
MEMORY_BYTES = 64 << 20
# A block of all rows, as float64, takes about so much.
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _Row:
    client: str
    num_examples: int
    update: SparseOrDense


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
        if update.indices is None and self._memory_left < 0:
            update = SparseOrDense(update.num_parameters, None, _mapped(update.values))
        self._rows.append(_Row(contribution.client, contribution.num_examples, update))
        self._rows.sort(key=lambda row: row.client)

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
                if row.update.indices is None:
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


def _mapped(values: Vector) -> Vector:
    with tempfile.TemporaryFile() as file:
        file.write(np.ascontiguousarray(values).data)
        file.flush()
        # The mapping keeps the file's contents alive after it is closed; nothing has to be cleaned up.
        return np.memmap(file, np.float32, "r", shape=values.shape)

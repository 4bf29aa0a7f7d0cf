"""Trainable weights that are int8 between steps, and how they learn all the same.

A weight is w = s q, with q whole numbers in int8 and one scale s for each row; the graph multiplies. The derivative of
the loss with respect to q is s times that with respect to w, while q is 1/s times w: a plain step on q would move w
by s^2 times too little, which for s = 0.005 is nothing. Quantization-aware scaling (Lin et al. 2022, "On-Device
Training Under 256KB Memory", arXiv:2206.15472, section 3.1) divides the gradient of q by s^2, so that

    q <- q - rate (s dL/dw) / s^2 = q - rate (dL/dw) / s

moves w by what a float weight would move. The graphs give dL/dw, the derivative of q divided by s, so that norms,
momentum, weight decay and all corrections are those of the float model; the other division is done here.

Most of these steps are smaller than 1. Rounding them to the nearest would lose them; keeping remainders would cost the
memory that int8 saves. So the sum is rounded at random, up with the probability of its fraction: it moves by the
right amount on average, with no further state. A row that outgrows its range, or fills less than a quarter of it, gets
a new scale in the same rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import TrainingError
from edgetrain.protocol.int8 import LARGEST, nearest, row_scales
from edgetrain.protocol.manifest import ParameterEntry
from edgetrain.protocol.vectors import Vector

Array = npt.NDArray[np.generic]

# Elements that are widened at a time.
_BLOCK = 1 << 16
# A row may shrink to this share of its range before it gets a finer scale.
_SHRUNK = 0.25
# A new scale leaves so much room above the largest value.
_ROOM = 1.25


def any_in_int8(entries: Iterable[ParameterEntry]) -> bool:
    """Whether a bundle with these parameters keeps weights in int8."""
    return any(entry.dtype == "int8" for entry in entries)


@dataclass(frozen=True, slots=True)
class _Held:
    """One parameter."""

    entry: ParameterEntry
    # int8 [O, ...], or float32.
    values: Array
    # [O, 1, ...] of int8 values.
    scales: Vector | None


class Int8Parameters:
    """The parameters of a bundle with weights in int8, in one byte for each element of these.

    Args:
        entries: the manifest's parameters.
        vector: float32 [num_parameters]; weights in int8 are rounded to the nearest.
    """

    def __init__(self, entries: tuple[ParameterEntry, ...], vector: Vector) -> None:
        self._held: list[_Held] = []
        for entry in entries:
            part = entry.of(vector)
            if entry.dtype == "int8":
                values, scales = nearest(part)
                self._held.append(_Held(entry, values, scales))
            else:
                self._held.append(_Held(entry, part.copy(), None))

    def graph_inputs(self) -> list[Array]:
        """The first inputs of every graph, see `protocol.manifest`; memory that keeps its place."""
        scales = [held.scales.reshape(-1) for held in self._held if held.scales is not None]
        return [*(held.values for held in self._held), *scales]

    def vector(self) -> Vector:
        """The flat vector, float32 [num_parameters], fresh memory."""
        vector = np.empty(sum(held.entry.numel for held in self._held), np.float32)
        for part, values in self.blocks():
            vector[part] = values
        return vector

    def blocks(self) -> Iterator[tuple[slice, Vector]]:
        """The flat vector piece by piece."""
        for block, values in self._blocks():
            yield block.part, values.ravel()

    def update(self, change: Callable[[slice, Vector], Vector], rng: np.random.Generator) -> None:
        """Replaces the flat vector piece by piece; weights in int8 are rounded at random.

        Args:
            change: (where, the old piece) -> the new one, float32 of the same length.
            rng: of the rounding.

        Raises:
            TrainingError: a weight in int8 is not finite.
        """
        for block, old in self._blocks():
            new = change(block.part, old.ravel()).reshape(old.shape)
            if block.scales is None:
                block.values[...] = new
            else:
                block.scales[...] = _fitting(block.scales, new, block.name)
                up = rng.random(new.shape, np.float32)
                rounded = np.floor(new / block.scales + up)
                block.values[...] = np.clip(rounded, -LARGEST, LARGEST)

    def _blocks(self) -> Iterator[tuple[_Block, Vector]]:
        for held in self._held:
            offset = held.entry.offset
            if held.scales is None:
                values = held.values.astype(np.float32)
                yield _Block(held.entry.name, slice(offset, offset + values.size), held.values, None), values
                continue
            length = held.entry.numel // max(len(held.values), 1)
            rows = max(1, _BLOCK // max(length, 1))
            for first in range(0, len(held.values), rows):
                whole, scales = held.values[first : first + rows], held.scales[first : first + rows]
                start = offset + first * length
                yield (
                    _Block(held.entry.name, slice(start, start + whole.size), whole, scales),
                    whole.astype(np.float32) * scales,
                )


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of a parameter, as views."""

    name: str
    # Where they are in the flat vector.
    part: slice
    values: Array
    scales: Vector | None


def _fitting(scales: Vector, new: Vector, name: str) -> Vector:
    """The scales, or others for rows whose range they do not fit."""
    largest = np.abs(new).max(axis=tuple(range(1, new.ndim)), keepdims=True, initial=0)
    if not np.isfinite(largest).all():
        raise TrainingError(f"{name} is not finite after a step: lower learning_rate, or set max_grad_norm")
    full = LARGEST * scales
    return np.where((largest > full) | (largest < _SHRUNK * full), row_scales(largest, _ROOM), scales)

"""Buffers of one micro-batch that a session binds once and refills for every call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.runtimes.base import Batch, Half
from edgetrain.edge_client.runtimes.leaves import (
    Array,
    check_dtype,
    check_finite,
    check_shape,
    flatten,
    halves,
)
from edgetrain.protocol.manifest import CLIP_NORM, Manifest, Structure, TensorSpec
from edgetrain.protocol.vectors import Vector

# Some runtimes' kernels read up to so many bytes beyond an input.
READ_BEYOND = 64


class Staging:
    """The padded micro-batch: one array per leaf, by the leaf's name, and `weights`.

    A smaller batch is padded with copies of its first sample at weight 0: zeros could make a NaN (a mask
    that hides everything, a division by a norm), which weight 0 would not remove.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._spec = manifest.batch
        self._micro_batch = manifest.micro_batch
        specs = [*manifest.batch.inputs.leaves, *manifest.batch.targets.leaves, manifest.batch.weights]
        self.arrays: dict[str, Array] = {spec.name: _zeros(spec) for spec in specs}
        self.specs: dict[str, TensorSpec] = {spec.name: spec for spec in specs}
        self._weights = self.arrays[manifest.batch.weights.name]
        self._clip_norm = self.arrays[CLIP_NORM] = np.ones((), np.float32)
        self.specs[CLIP_NORM] = TensorSpec(name=CLIP_NORM, dtype="float32", shape=())

    def add(self, specs: Sequence[TensorSpec]) -> None:
        """Adds buffers that a graph fills, for another one to read."""
        self.specs |= {spec.name: spec for spec in specs}
        self.arrays |= {spec.name: _zeros(spec) for spec in specs}

    def fill(self, batch: Batch, weights: npt.NDArray[np.float32] | None) -> int:
        """Takes over a batch.

        Args:
            batch: `(inputs, targets)` of at most the micro-batch.
            weights: float [B], or [B, T] if the losses are per token; ones if None.

        Returns:
            The number of samples, before padding.

        Raises:
            DataError: a wrong structure, shape, dtype or number of samples, or a value that is not finite.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(f"a batch is (inputs, targets), got a {type(batch).__name__}")
        found = {
            name: flatten(name, structure, half)
            for (name, structure), half in zip(halves(self._spec), batch, strict=True)
        }
        for name, structure in halves(self._spec):
            _check_shapes(structure, found[name])
        count = self._count([array for arrays in found.values() for array in arrays])
        for name, structure in halves(self._spec):
            self._fill_half(structure, found[name], count)
        self._fill_weights(weights, count)
        return count

    def set_clip_norm(self, clip_norm: float) -> None:
        """Sets the norm that samples' gradients are clipped to.

        Raises:
            DataError: not above 0, or not finite.
        """
        if not 0 < clip_norm < np.inf:
            raise DataError(f"clip_norm is {clip_norm:g}, must be above 0 and finite")
        self._clip_norm[...] = clip_norm

    def fill_inputs(self, inputs: Half) -> int:
        """As `fill`, for inputs alone."""
        arrays = flatten("inputs", self._spec.inputs, inputs)
        _check_shapes(self._spec.inputs, arrays)
        count = self._count(arrays)
        self._fill_half(self._spec.inputs, arrays, count)
        return count

    def _count(self, arrays: list[Array]) -> int:
        counts = {len(array) for array in arrays}
        if len(counts) != 1:
            raise DataError(f"the arrays of a batch have different lengths: {sorted(counts)}")
        count = counts.pop()
        if count == 0:
            raise DataError("a batch needs at least one sample in dimension 0")
        if count > self._micro_batch:
            raise DataError(
                f"a batch of {count} samples is larger than the bundle's micro-batch of {self._micro_batch}: "
                "split it and add the sums"
            )
        return count

    def _fill_half(self, structure: Structure, arrays: list[Array], count: int) -> None:
        for spec, array in zip(structure.leaves, arrays, strict=True):
            check_dtype(spec, array)
            buffer = self.arrays[spec.name]
            with np.errstate(over="ignore"):
                np.copyto(buffer[:count], array, casting="unsafe")
            # After the cast: a float64 beyond float32's range has become infinite.
            check_finite(spec, buffer[:count])
            buffer[count:] = buffer[0]

    def _fill_weights(self, weights: Vector | None, count: int) -> None:
        buffer = self._weights
        buffer[count:] = 0
        if weights is None:
            buffer[:count] = 1
            return
        spec = self._spec.weights
        if not isinstance(weights, np.ndarray) or weights.dtype.kind not in "fiub":
            raise DataError(f"weights: expected a float32 numpy array, got {_type(weights)}")
        if weights.ndim == 1 and len(spec.shape) > 1:
            weights = weights.reshape(-1, *[1] * (len(spec.shape) - 1))
        elif weights.ndim != len(spec.shape) or weights.shape[1:] != spec.shape[1:]:
            expected = ", ".join(["N", *map(str, spec.shape[1:])])
            raise DataError(f"weights: expected shape [{expected}] or [N], got {list(weights.shape)}")
        if len(weights) != count:
            raise DataError(f"weights: {len(weights)} weights for {count} samples")
        buffer[:count] = weights
        check_finite(spec, buffer[:count])


def _zeros(spec: TensorSpec) -> Array:
    """With memory behind the end that may be read, too."""
    room = np.zeros(spec.nbytes + READ_BEYOND, np.uint8)
    return room[: spec.nbytes].view(spec.dtype).reshape(spec.shape)


def _check_shapes(structure: Structure, arrays: list[Array]) -> None:
    for spec, array in zip(structure.leaves, arrays, strict=True):
        check_shape(spec, array)


def _type(value: object) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def check_vector(vector: Vector, length: int, what: str = "parameters") -> None:
    """Checks a flat vector.

    Raises:
        DataError: not a contiguous float32 vector of that length.
    """
    if (
        not isinstance(vector, np.ndarray)
        or vector.dtype != np.float32
        or vector.shape != (length,)
        or not vector.flags.c_contiguous
    ):
        got = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, np.ndarray) else _type(vector)
        raise DataError(f"{what}: expected a contiguous float32 vector of {length}, got {got}")

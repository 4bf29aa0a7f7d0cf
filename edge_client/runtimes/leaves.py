"""The leaves of a batch: finding them in the user's arrays and checking them against the manifest.

Which dtypes pass, since a device's data often has another width than the graph:

- to a float leaf: any float (float64 is rounded), bool, and integers that convert exactly (8 and 16 bits to
  float32). Wider integers are refused: they are more often indices than measurements.
- to an integer leaf: bool and any integer whose values fit. A float never becomes an integer.
- to a bool leaf: bool only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.runtimes.base import Half
from edgetrain.protocol.manifest import BatchSpec, Structure, TensorSpec

Array = npt.NDArray[np.generic]


def halves(batch: BatchSpec) -> tuple[tuple[str, Structure], tuple[str, Structure]]:
    """The two halves of a batch by name."""
    return ("inputs", batch.inputs), ("targets", batch.targets)


def leaf_key(name: str, leaf: TensorSpec) -> str:
    """A leaf's own index or key: "input_ids" of "inputs.input_ids"."""
    return leaf.name.removeprefix(f"{name}.")


def describe(name: str, structure: Structure) -> str:
    """The structure in words, for error messages."""
    if structure.kind == "array":
        return f"{name} as one array"
    keys = ", ".join(leaf_key(name, leaf) for leaf in structure.leaves)
    return f"{name} as a {structure.kind} of ({keys})"


def flatten(name: str, structure: Structure, half: Half) -> list[Array]:
    """The arrays of one half in the manifest's order.

    Raises:
        DataError: another structure than the example batch's.
    """
    arrays: Sequence[object]
    if structure.kind == "array":
        arrays = [half]
    elif structure.kind == "tuple":
        if not isinstance(half, tuple | list) or len(half) != len(structure.leaves):
            raise DataError(f"the bundle takes {describe(name, structure)}, got {_kind(half)}")
        arrays = half
    else:
        keys = [leaf_key(name, leaf) for leaf in structure.leaves]
        if not isinstance(half, Mapping) or set(half) != set(keys):
            raise DataError(f"the bundle takes {describe(name, structure)}, got {_kind(half)}")
        arrays = [half[key] for key in keys]
    flat: list[Array] = []
    for leaf, array in zip(structure.leaves, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise DataError(f"{leaf.name}: expected a numpy array, got {_kind(array)}")
        flat.append(array)
    return flat


def unflatten(name: str, structure: Structure, arrays: Sequence[Array]) -> Half:
    """The inverse of `flatten`."""
    if structure.kind == "array":
        return arrays[0]
    if structure.kind == "tuple":
        return tuple(arrays)
    return {leaf_key(name, leaf): array for leaf, array in zip(structure.leaves, arrays, strict=True)}


def check_shape(spec: TensorSpec, array: Array, where: str = "") -> None:
    """Checks every dimension but the first.

    Args:
        spec: the leaf.
        array: the user's array, any number of samples.
        where: prefix of the message, e.g. "data.npz: ".

    Raises:
        DataError: another shape.
    """
    if array.ndim != len(spec.shape) or array.shape[1:] != spec.shape[1:]:
        expected = ", ".join(["N", *map(str, spec.shape[1:])])
        raise DataError(f"{where}{spec.name}: expected shape [{expected}], got {list(array.shape)}")


def check_dtype(spec: TensorSpec, array: Array, where: str = "") -> None:
    """Checks that the array's dtype converts to the leaf's; the module docstring says which do.

    Raises:
        DataError: it does not, or an integer lies outside the leaf's range.
    """
    source, target = array.dtype, np.dtype(spec.dtype)
    if source == target or np.can_cast(source, target, "safe"):
        return
    if target.kind == "f" and source.kind == "f":
        return
    if target.kind in "iu" and source.kind in "iu":
        bounds = np.iinfo(target)
        if array.size == 0 or (int(array.min()) >= bounds.min and int(array.max()) <= bounds.max):
            return
        raise DataError(f"{where}{spec.name}: values from {array.min()} to {array.max()} do not fit {spec.dtype}")
    raise DataError(
        f"{where}{spec.name}: expected {spec.dtype}, got {source}; convert it with .astype({spec.dtype!r}) "
        "if that is what you mean"
    )


def check_finite(spec: TensorSpec, array: Array, where: str = "", first: int = 0) -> None:
    """Checks for NaN and infinity.

    Args:
        spec: the leaf.
        array: samples along dimension 0.
        where: prefix of the message.
        first: the number of the array's first sample, for the message.

    Raises:
        DataError: names the first sample that has one.
    """
    if array.dtype.kind != "f":
        return
    # The sum is finite if all values are, short of overflow: one cheap pass in the usual case.
    with np.errstate(all="ignore"):
        if np.isfinite(np.add.reduce(array, axis=None)):
            return
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        sample = first + int(np.argmin(finite))
        raise DataError(f"{where}{spec.name}: sample {sample} holds a value that is NaN or infinite")


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"one array of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of ({', '.join(map(str, value))})"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"

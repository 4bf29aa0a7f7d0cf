"""Flat parameter vectors, what identifies one, and tensors by name as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgetrain.protocol.manifest import ParameterEntry

Vector = npt.NDArray[np.float32]
"""Float32; if nothing else is said flat and in manifest order, [num_parameters]."""


def vector_digest(vector: Vector) -> bytes:
    """SHA-256 of a vector's little-endian float32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).digest()


def from_named(tensors: Mapping[str, npt.NDArray[Any]], entries: Sequence[ParameterEntry]) -> Vector:
    """The flat vector of tensors by the names they have in the user's module; further ones are left out.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    vector = np.empty(sum(entry.numel for entry in entries), np.float32)
    for entry in entries:
        tensor = tensors.get(entry.name)
        if tensor is None or tensor.shape != entry.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise ValueError(f"{entry.name!r} is {found}, the bundle has shape {list(entry.shape)}")
        entry.of(vector)[...] = tensor
    return vector

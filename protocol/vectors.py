"""Flat parameter vectors, and what identifies one."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
"""Float32; if nothing else is said flat and in manifest order, [num_parameters]."""


def vector_digest(vector: Vector) -> bytes:
    """SHA-256 of a vector's little-endian float32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).digest()

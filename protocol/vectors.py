"""What identifies a flat parameter vector."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def vector_digest(vector: npt.NDArray[np.float32]) -> bytes:
    """SHA-256 of a vector's little-endian float32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").data).digest()

"""Bounding what one participant adds to a sum."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def clip(vector: npt.NDArray[np.floating], max_norm: float) -> tuple[Doubles, float]:
    """A vector scaled down to a largest L2 norm.

    Returns:
        The clipped vector, float64; and the norm before.
    """
    doubles = vector.astype(np.float64)
    norm = float(np.linalg.norm(doubles))
    return (doubles * (max_norm / norm) if norm > max_norm else doubles), norm


def clip_to_grid(vector: npt.NDArray[np.floating], max_norm: float, step: float) -> tuple[npt.NDArray[np.int64], float]:
    """A vector as integer multiples of a step, of an L2 norm of at most `max_norm` *after* rounding.

    Rounding to the nearest can lengthen a vector by sqrt(d) / 2 steps. Where it has, the integers are shortened
    towards zero, so the sensitivity is `max_norm / step` exactly, without a margin for rounding.

    Args:
        vector: finite.
        max_norm: largest norm.
        step: of the grid; max_norm / step must be below 2^52.

    Returns:
        int64 multiples; and the norm of the vector before.
    """
    clipped, norm = clip(vector, max_norm)
    limit = max_norm / step
    rounded = np.rint(clipped / step)
    length = _length(rounded)
    while length > limit:
        # Truncation shortens by itself; the factor makes sure that this ends.
        rounded = np.trunc(rounded * ((1 - 2.0**-20) * limit / length))
        length = _length(rounded)
    return rounded.astype(np.int64), norm


def _length(integers: Doubles) -> float:
    """The norm, rounded up by more than what float64 may have lost."""
    return math.sqrt(float(integers @ integers)) * (1 + 2.0**-40)

"""How far arrays are from what they should be."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def relative_error(got: Iterable[npt.NDArray[np.generic]], exact: Iterable[npt.NDArray[np.generic]]) -> float:
    """Root mean square of the differences of all elements, relative to that of the exact ones.

    Of nothing but zeros it is 1 if anything differs.
    """
    error = energy = 0.0
    for ours, theirs in zip(got, exact, strict=True):
        values = theirs.astype(np.float64)
        error += float(np.square(values - ours.astype(np.float64)).sum())
        energy += float(np.square(values).sum())
    return float((error / energy) ** 0.5) if energy else float(error > 0)

"""What a strategy is: how updates become the next parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs import SparseOrDense

Vector = npt.NDArray[np.float32]

ServerState = Mapping[str, npt.NDArray[np.generic]]
"""What a strategy remembers from round to round (e.g. momentum), saved with the parameters."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One accepted update, as a strategy sees it."""

    client: str
    num_examples: int
    # Optimizer steps that the client did.
    steps: int
    update: SparseOrDense


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy is a value, made by a factory that closes over its hyper-parameters.

    `init(num_parameters, state)` starts a round's partial result; `fold(partial, contribution)` consumes one
    update at a time, in any order, and returns the partial; it raises `UpdateRefused` and changes nothing if
    it will not have one. `finish(partial, parameters, state)` returns the next parameters and state.
    """

    name: str
    init: Callable[[int, ServerState], Any]
    fold: Callable[[Any, Contribution], Any]
    finish: Callable[[Any, Vector, ServerState], tuple[Vector, ServerState]]

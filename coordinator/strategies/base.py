"""What a strategy is: how updates become the next parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy.typing as npt

from edgetrain.protocol.codecs import CodecSpec, SparseOrDense
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.vectors import Vector

ServerState = Mapping[str, npt.NDArray[Any]]
"""What a strategy remembers from round to round (e.g. momentum), saved with the parameters.

Every strategy writes under names of its own ("fedadam/m") and passes on what it does not know, so that
strategies can be stacked.
"""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One accepted update, as a strategy sees it."""

    client: str
    num_examples: int
    # Optimizer steps that the client did.
    steps: int
    update: SparseOrDense
    # How it was told to train.
    training: TrainingConfig = TrainingConfig()
    # How many versions of the parameters have come out since those that it started from; 0 in synchronous
    # rounds.
    staleness: int = 0
    # Change of the client's control variate, where the strategy asks for one.
    control: SparseOrDense | None = None
    # Whether its norm was within what it was told to clip to; None if it does not say.
    unclipped: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a strategy is to work, so that it can refuse what makes no sense."""

    codec: CodecSpec = CodecSpec()
    training: TrainingConfig = TrainingConfig()
    # Fewest and most updates that a round closes with.
    minimum: int = 1
    goal: int = 1
    # Nobody sees a single update, only sums of them (secure aggregation).
    only_sums: bool = False


@dataclass(frozen=True, slots=True)
class Private:
    """What a differentially private strategy reveals."""

    # In every round, about one client.
    release: Release
    # The L2 norm that clients clip their updates to, from the state.
    clip_norm: Callable[[ServerState], float]
    # Clients that could be drawn, where the release counts on sampling.
    population: int = 0


@runtime_checkable
class Mergeable(Protocol):
    """A partial result that several workers can each have a part of."""

    def share(self, parts: int) -> None:
        """Refuses updates so early that so many partial results can be merged whatever is in the others."""
        ...

    def merge(self, other: Self) -> None:
        """Takes in another one: to the bit what folding its contributions here would have given."""
        ...


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy is a value, made by a factory that closes over its hyper-parameters.

    `init(num_parameters, state)` starts a round's partial result; `fold(partial, contribution)` consumes one
    update at a time, in any order, and returns the partial; it raises `UpdateRefused` and changes nothing if
    it will not have one. `finish(partial, parameters, state)` returns the next parameters and state, and
    depends on the set of contributions only, never on their order.
    """

    name: str
    init: Callable[[int, ServerState], Any]
    fold: Callable[[Any, Contribution], Any]
    finish: Callable[[Any, Vector, ServerState], tuple[Vector, ServerState]]
    # What it is made of, the outermost wrapper first.
    layers: tuple[str, ...] = ()
    # It looks at every update by itself, not only at their sum.
    needs_all: bool = False
    # Clients need not wait for each other: updates of older parameters are folded, too.
    asynchronous: bool = False
    # What it changes in the clients' training.
    training: Callable[[TrainingConfig], TrainingConfig] = lambda config: config
    # The server's control variate, float32 [num_parameters], from (num_parameters, state); clients then keep
    # their own and send its change along. None: no control variates.
    control: Callable[[int, ServerState], Vector] | None = None
    # It adds noise: what a round reveals. None: everything.
    private: Private | None = None
    # Why it cannot work there, or None.
    objection: Callable[[Setting], str | None] = lambda _setting: None


def described(strategy: Strategy) -> str:
    """The whole stack, e.g. "norm-bound(fedadam(fedavg))"."""
    *wrappers, innermost = strategy.layers or (strategy.name,)
    return "".join(f"{name}(" for name in wrappers) + innermost + ")" * len(wrappers)

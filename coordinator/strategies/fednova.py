"""FedNova: clients that did more steps do not pull harder.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS
2020. A local training of tau steps ends at  x - learning_rate * sum_k a_k g_k;  equation 6 divides every
delta by |a|_1, averages, and multiplies by the weighted mean of the |a|_1.

|a|_1 is what a gradient of ones would have moved, over the learning rate, since the a_k of the optimizers
here are not negative. Running the optimizer once on ones covers momentum, Nesterov, the proximal term and
every schedule; for momentum rho and for proximal mu it gives the closed forms of the paper's section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.strategies.base import Contribution, ServerState, Setting, Strategy
from edgetrain.edge_client.training.schedules import learning_rate_factor
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.vectors import Vector

# The norm is worked out step by step: nobody may claim so many that this takes long.
MAX_STEPS = 200_000
_UNIT = 2**30


@lru_cache(maxsize=1024)
def accumulation_norm(training: TrainingConfig, steps: int) -> float:
    """|a|_1 of a local training: its number of steps, if it is plain SGD at a constant rate.

    Args:
        training: momentum, nesterov, proximal_mu, learning_rate and schedule count.
        steps: optimizer steps done.
    """
    moved = velocity = 0.0
    for step in range(steps):
        gradient = 1.0 - training.proximal_mu * moved
        velocity = training.momentum * velocity + gradient
        direction = gradient + training.momentum * velocity if training.nesterov else velocity
        moved += training.learning_rate * learning_rate_factor(training.schedule, step, steps) * direction
    return moved / training.learning_rate


@dataclass(slots=True)
class _Partial:
    # Of num_examples * delta / |a|_1.
    normalized: FixedPointSum
    # Of num_examples * |a|_1, as an exact multiple of 2^-30.
    norms: int = field(default=0)

    def share(self, parts: int) -> None:
        self.normalized.share(parts)

    def merge(self, other: _Partial) -> None:
        self.normalized.merge(other.normalized)
        self.norms += other.norms


def fednova() -> Strategy:
    """Normalized averaging, weighted by number of examples."""

    def init(num_parameters: int, _state: ServerState) -> _Partial:
        return _Partial(FixedPointSum(num_parameters))

    def fold(partial: _Partial, contribution: Contribution) -> _Partial:
        if not 1 <= contribution.steps <= MAX_STEPS:
            raise UpdateRefused(f"claims {contribution.steps} steps, FedNova allows 1 to {MAX_STEPS}")
        norm = accumulation_norm(contribution.training, contribution.steps)
        if norm <= 0:
            raise UpdateRefused("its learning rate was 0 in every step: there is nothing to normalize")
        partial.normalized.add(contribution.update, contribution.num_examples, 1 / norm)
        partial.norms += contribution.num_examples * round(norm * _UNIT)
        return partial

    def finish(partial: _Partial, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        effective = partial.norms / _UNIT / max(partial.normalized.weight, 1)
        return (parameters + effective * partial.normalized.mean()).astype(np.float32), state

    def objection(setting: Setting) -> str | None:
        training = setting.training
        if training.learning_rate == 0:
            return "a learning rate of 0 moves nothing that could be normalized"
        if training.learning_rate * training.proximal_mu >= 1:
            return "learning_rate * proximal_mu is 1 or more: the proximal term alone would overshoot"
        if setting.only_sums:
            return "only sums of updates are seen, and a client's delta is divided by its own norm first"
        return None

    return Strategy("fednova", init, fold, finish, objection=objection)

"""FedBuff: clients come and go at their own pace; the server steps whenever its buffer is full.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1:
K updates are scaled by their staleness, averaged over K and added. The staleness functions are those of
Xie et al., "Asynchronous Federated Optimization", 2019, section 5.2.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.strategies.base import Contribution, ServerState, Setting, Strategy
from edgetrain.protocol.vectors import Vector


def fedbuff(
    *,
    staleness: Literal["polynomial", "constant", "hinge"] = "polynomial",
    exponent: Annotated[float, Meta(ge=0)] = 0.5,
    hinge_slope: Annotated[float, Meta(gt=0)] = 10.0,
    hinge_grace: Annotated[float, Meta(ge=0)] = 4.0,
    max_staleness: Annotated[int, Meta(ge=0)] = 20,
    learning_rate: Annotated[float, Meta(gt=0)] = 1.0,
    weighted: bool = False,
) -> Strategy:
    """Buffered asynchronous aggregation; `rounds.goal` is the size of the buffer.

    Args:
        staleness: how much an update counts that is t versions old. polynomial: (1 + t)^-exponent;
            constant: 1; hinge: 1 up to `hinge_grace`, then 1 / (hinge_slope * (t - hinge_grace) + 1).
        exponent: the paper's is 0.5.
        hinge_slope: a of Xie et al.
        hinge_grace: b of Xie et al.
        max_staleness: older updates are refused.
        learning_rate: the server's.
        weighted: by number of examples, too.
    """

    def scale(age: int) -> float:
        if staleness == "polynomial":
            return float((1.0 + age) ** -exponent)
        if staleness == "hinge" and age > hinge_grace:
            return 1.0 / (hinge_slope * (age - hinge_grace) + 1.0)
        return 1.0

    def init(num_parameters: int, _state: ServerState) -> FixedPointSum:
        return FixedPointSum(num_parameters)

    def fold(partial: FixedPointSum, contribution: Contribution) -> FixedPointSum:
        if contribution.staleness > max_staleness:
            raise UpdateRefused(
                f"was trained from parameters {contribution.staleness} versions old, allowed are {max_staleness}"
            )
        weight = contribution.num_examples if weighted else 1
        partial.add(contribution.update, weight, scale(contribution.staleness))
        return partial

    def finish(partial: FixedPointSum, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        return (parameters + learning_rate * partial.mean()).astype(np.float32), state

    def objection(setting: Setting) -> str | None:
        if setting.only_sums and staleness != "constant":
            return (
                "only sums of updates are seen, and each is scaled by its own staleness first: "
                'set staleness = "constant"'
            )
        return None

    return Strategy("fedbuff", init, fold, finish, asynchronous=True, objection=objection)

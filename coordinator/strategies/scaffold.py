"""SCAFFOLD: control variates correct the drift of clients whose data differ.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1
with option II. The server's variate c travels with the plan; client i keeps its own c_i, trains with
gradients  g - c_i + c,  and sends the change of c_i beside its delta.

Both are compressed. The client adds to c_i what the server decodes, not what it would have liked to send, so
c stays the mean of the c_i exactly, and what was left out is in the next change.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.strategies.base import Contribution, ServerState, Setting, Strategy
from edgetrain.protocol.vectors import Vector

_SUM, _MEMBERS = "scaffold/control_sum", "scaffold/members"


@dataclass(slots=True)
class _Partial:
    deltas: FixedPointSum
    controls: FixedPointSum
    clients: list[str] = field(default_factory=list)

    def share(self, parts: int) -> None:
        self.deltas.share(parts)
        self.controls.share(parts)

    def merge(self, other: _Partial) -> None:
        self.deltas.merge(other.deltas)
        self.controls.merge(other.controls)
        self.clients += other.clients


def scaffold(
    *,
    num_clients: Annotated[int, Meta(ge=0)] = 0,
    learning_rate: Annotated[float, Meta(gt=0)] = 1.0,
    weighted: bool = False,
) -> Strategy:
    """Averages deltas and control variates.

    Args:
        num_clients: N of the paper, over which the control variates are averaged; those that never took part
            count as 0. At least the number that did.
        learning_rate: the server's.
        weighted: deltas by number of examples; the paper's mean is plain.
    """

    def init(num_parameters: int, _state: ServerState) -> _Partial:
        return _Partial(FixedPointSum(num_parameters), FixedPointSum(num_parameters))

    def fold(partial: _Partial, contribution: Contribution) -> _Partial:
        if contribution.control is None:
            raise UpdateRefused("the update has no control variate; SCAFFOLD needs one")
        weight = contribution.num_examples if weighted else 1
        partial.controls.check(contribution.control, 1)
        partial.deltas.add(contribution.update, weight)
        partial.controls.add(contribution.control, 1)
        partial.clients.append(contribution.client)
        return partial

    def finish(partial: _Partial, parameters: Vector, state: ServerState) -> tuple[Vector, ServerState]:
        after = (parameters + learning_rate * partial.deltas.mean()).astype(np.float32)
        total = partial.controls.over(1)
        if _SUM in state:
            total += state[_SUM]
        members = np.union1d(_members(state), np.array([_hash(name) for name in partial.clients], np.uint64))
        return after, {**state, _SUM: total, _MEMBERS: members}

    def control(num_parameters: int, state: ServerState) -> Vector:
        if _SUM not in state:
            return np.zeros(num_parameters, np.float32)
        mean: Vector = (state[_SUM] / max(num_clients, len(_members(state)), 1)).astype(np.float32)
        return mean

    def objection(setting: Setting) -> str | None:
        training = setting.training
        if training.momentum or training.proximal_mu:
            return (
                "control variates are worked out from the way a client went, which momentum and the proximal "
                "term change: set training.momentum and training.proximal_mu to 0"
            )
        if training.learning_rate == 0:
            return "a learning rate of 0 gives no control variates"
        return None

    return Strategy("scaffold", init, fold, finish, control=control, objection=objection)


def _members(state: ServerState) -> npt.NDArray[np.uint64]:
    return state.get(_MEMBERS, np.zeros(0, np.uint64))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

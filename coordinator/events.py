"""What a coordinator tells whoever watches: the command line's progress, logs, tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.run.records import RoundRecord, Summary


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not enough clients yet."""

    ready: int
    wanted: int


@dataclass(frozen=True, slots=True)
class ClientJoined:
    """A client is ready to take part."""

    client: str
    num_examples: int


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """A client said goodbye, or its connection was lost."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """Invitations are out."""

    round: int
    attempt: int
    invited: int


class UpdateAccepted(msgspec.Struct, frozen=True, gc=False):
    """An update is on disk and in the sum."""

    round: int
    client: str
    update_bytes: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Something that a client sent was refused."""

    client: str
    reason: str
    # One of `refusals.Kind`.
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out loss and accuracy of the parameters after a round; round 0 is before the first."""

    round: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class ClientsEvaluated:
    """Clients have evaluated the parameters after a round."""

    evaluation: FederatedEvaluation


@dataclass(frozen=True, slots=True)
class Paused:
    """Nobody is invited until the run is resumed."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """It goes on."""


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """A round is on disk."""

    record: RoundRecord


@dataclass(frozen=True, slots=True)
class RunEnded:
    """That was it."""

    summary: Summary


Event = (
    Waiting
    | ClientJoined
    | ClientLeft
    | RoundStarted
    | UpdateAccepted
    | Refused
    | Evaluated
    | ClientsEvaluated
    | Paused
    | Resumed
    | RoundEnded
    | RunEnded
)
Observer = Callable[[Event], None]

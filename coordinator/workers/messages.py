"""What the coordinator and its workers say to each other. Pickled by what carries it: both ends are ours.

An update:   Held (whole) -> Take -> Taken | Refused
in pieces:   Held -> Spool -> Spooled, … until it is whole, then as above
A round:     OpenRound, updates, CloseRound -> Share
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.strategies import ServerState

# --- coordinator -> worker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRound:
    """Updates of this round may come."""

    opened: RoundOpened
    # The worker's journal; what an earlier worker in its place has left there is taken up.
    segment: Path
    num_parameters: int
    max_update_bytes: int
    server_state: ServerState
    # Of how many partial sums the worker's is one.
    shares: int


@dataclass(frozen=True, slots=True)
class Take:
    """Fold this update, which you hold whole; or which is whole in the spool directory."""

    client: str
    # The offer as it came.
    envelope: bytes
    # How the client was told to train, encoded.
    training: bytes
    spool: Path | None = None


@dataclass(frozen=True, slots=True)
class Spool:
    """Write the pieces that you hold of this blob to a directory: others have the rest."""

    client: str
    digest: bytes
    directory: Path


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody wants these pieces."""

    client: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class CloseRound:
    """Give your share, and forget the round."""

    round: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End."""


Command = OpenRound | Take | Spool | Drop | CloseRound | Stop


# --- worker -> coordinator ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """It listens."""


@dataclass(frozen=True, slots=True)
class Held:
    """A piece of a blob of `size` bytes has arrived."""

    client: str
    digest: bytes
    size: int
    start: int
    stop: int
    # The blob is in one piece, and its SHA-256 is right.
    whole: bool


@dataclass(frozen=True, slots=True)
class Spooled:
    """A piece is in the spool directory."""

    client: str
    digest: bytes
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Taken:
    """The update of a client is folded, and on the disk."""

    client: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The update of a client is not folded."""

    client: str
    reason: str
    # It is not the update's fault: it is not here any more.
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Malformed:
    """What came on a client's topic is no chunk."""

    client: str
    num_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Share:
    """A worker's part of a round: the strategy's partial result, and whose updates are in it."""

    round: int
    partial: Any
    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot go on: its disk is full, most likely."""

    reason: str


Report = Started | Held | Spooled | Taken | Refused | Malformed | Share | Failed


# --- as the coordinator's loop gets them -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reports:
    """Reports of one worker, in order."""

    worker: int
    # Of its life: those of an earlier worker in the same place do not count.
    life: int
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class Died:
    """A worker is gone."""

    worker: int
    life: int
    reason: str

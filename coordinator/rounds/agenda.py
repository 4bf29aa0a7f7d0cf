"""What the coordinator is at, for everyone who handles what arrives."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.protocol.messages import Plan, Report


@dataclass(slots=True)
class Agenda:
    """One per coordinator. Set by its rounds, read by whoever handles mail."""

    # The round that is open, if one is.
    current: OpenRound | None = None
    # The evaluation that clients are asked for, and what they reported.
    evaluation_plan: Plan | None = None
    reports: dict[str, Report] = field(default_factory=dict)

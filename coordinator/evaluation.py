"""What held-out data say about parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss and, where the bundle counts it, accuracy."""

    loss: float
    accuracy: float | None

"""The round that is open: its state machine, what it has collected, what is on its way in."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgetrain.coordinator.collection import Collection
from edgetrain.coordinator.rounds import Round
from edgetrain.protocol.blobs import Assembler
from edgetrain.protocol.messages import BlobRef, Offer, Patch


@dataclass(slots=True)
class Upload:
    """An update on its way in."""

    offer: Offer
    # The offer as it came, signed.
    envelope: bytes
    assembler: Assembler
    # When its last chunk came, on the coordinator's clock.
    moved_at: float


@dataclass(slots=True)
class OpenRound:
    """Everything about the round that is open."""

    state: Round
    collection: Collection
    # SHA-256 of the vector that the clients start from, and how they get it.
    vector: bytes
    parameters: BlobRef
    patches: tuple[Patch, ...]
    # When the first invitations went out.
    invited_at: float | None = None
    # One per client at most.
    uploads: dict[str, Upload] = field(default_factory=dict)
    refused: int = 0

    @property
    def blobs(self) -> list[BlobRef]:
        """What clients fetch for this round."""
        return [self.parameters, *(patch.blob for patch in self.patches)]

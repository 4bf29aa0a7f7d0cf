"""The round that is open: its state machine, what it has collected, what is on its way in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.rounds.state import OUTSTANDING, Round
from edgetrain.coordinator.secure.round import SecureRound
from edgetrain.coordinator.workers.pieces import RemotePieces
from edgetrain.protocol.blobs import Assembler
from edgetrain.protocol.messages import BlobRef, Offer, Patch
from edgetrain.protocol.partial import PartialBlob
from edgetrain.protocol.training import TrainingConfig


@dataclass(slots=True)
class Upload:
    """An update on its way in."""

    offer: Offer
    # The offer as it came, signed.
    envelope: bytes
    assembler: Assembler | PartialBlob | RemotePieces
    # When its last chunk came, or it was asked for, on the coordinator's clock.
    moved_at: float
    # How often it was asked for since.
    stalls: int = 0
    # It is whole, and with a worker.
    in_work: bool = False


@dataclass(slots=True)
class OpenRound:
    """Everything about the round that is open."""

    state: Round
    collection: Collection
    # SHA-256 of the vector that the clients start from, and how they get it.
    vector: bytes
    parameters: BlobRef
    patches: tuple[Patch, ...]
    # The control variate that goes with them, where the strategy has one.
    control: BlobRef | None = None
    # When the first invitations went out.
    invited_at: float | None = None
    # One per client at most.
    uploads: dict[str, Upload] = field(default_factory=dict)
    refused: int = 0
    # What clients said last when they declined, or were told when they were refused.
    reasons: dict[str, str] = field(default_factory=dict)
    # What each client was told.
    trainings: dict[str, TrainingConfig] = field(default_factory=dict)
    # When each was invited, and how long it then took.
    invited: dict[str, float] = field(default_factory=dict)
    durations: dict[str, float] = field(default_factory=dict)
    # Those whom chance chose, where privacy counts on it; None before it has.
    drawn: frozenset[str] | None = None
    # The norm that clients clip their updates to; 0 for none.
    clip_norm: float = 0.0
    # How often clients were chosen.
    invitations: int = 0
    # Of earlier rounds whose updates still count, by number; none in synchronous rounds.
    earlier: dict[int, bytes] = field(default_factory=dict)
    # Nonces of attempts at this round that were given up.
    given_up: frozenset[bytes] = frozenset()
    # The session of secure aggregation, where updates are only summed.
    secure: SecureRound | None = None

    def admits(self, number: int, nonce: bytes) -> bool:
        """Whether an update made for round `number` counts here."""
        return (number, nonce) == (self.state.number, self.state.nonce) or self.earlier.get(number) == nonce

    def drop_upload(self, client: str) -> None:
        """Forgets an upload that will not be finished, if there is one."""
        upload = self.uploads.pop(client, None)
        if upload:
            upload.assembler.discard()

    def take_over(self, last: OpenRound) -> None:
        """Goes on with whoever still works for the round before."""
        self.earlier = {**last.earlier, last.state.number: last.state.nonce}
        for name, part in last.state.parts.items():
            if part in OUTSTANDING and name not in self.state.parts:
                self.state.place(name, part)
                if name in last.trainings:
                    self.trainings[name] = last.trainings[name]
                if name in last.invited:
                    self.invited[name] = last.invited[name]
                if name in last.uploads:
                    self.uploads[name] = last.uploads[name]

    def forget_nonces(self, needed: set[int]) -> None:
        """Updates of earlier rounds count no more, but for these."""
        self.earlier = {number: nonce for number, nonce in self.earlier.items() if number in needed}

    @property
    def nonces(self) -> frozenset[bytes]:
        """Those that an honest client may have for this round."""
        return self.given_up | {self.state.nonce}

    @property
    def blobs(self) -> list[BlobRef]:
        """What clients fetch for this round."""
        blobs = [self.parameters, *(patch.blob for patch in self.patches)]
        blobs += [self.control] if self.control else []
        return blobs + self.secure.blobs if self.secure else blobs

    @property
    def contributors(self) -> Iterable[str]:
        """Those whose updates are in the sum, or may be unmasked with it."""
        return self.secure.survivors if self.secure else self.collection.digests

    def said(self) -> str:
        """What clients gave as reasons, for an error message."""
        said = [f"{client}: {reason}" for client, reason in sorted(self.reasons.items())]
        return f" ({'; '.join(said[:3])}{'; …' if len(said) > 3 else ''})" if said else ""

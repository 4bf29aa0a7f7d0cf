"""From an offer and its bytes to what a strategy folds: everything that a client claims is checked here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.coordinator.strategies import Contribution
from edgetrain.protocol import CodecError, MessageError
from edgetrain.protocol.codecs import Limits, SparseOrDense, decode
from edgetrain.protocol.messages import Offer, decode_from_client, split_update
from edgetrain.protocol.signing import unseal
from edgetrain.protocol.training import TrainingConfig, count_steps


@dataclass(frozen=True, slots=True)
class Checks:
    """What updates of a run must be.

    Attributes:
        num_parameters: length of the flat vector.
        limits: for decoding.
        max_examples: of one client.
    """

    num_parameters: int
    limits: Limits
    max_examples: int

    def contribution(
        self, client: str, offer: Offer, data: memoryview, training: TrainingConfig, *, round_number: int
    ) -> Contribution:
        """Decodes an update.

        Raises:
            UpdateRefused: it is not what it must be.
        """
        if not 1 <= offer.num_examples <= self.max_examples:
            raise UpdateRefused(f"claims {offer.num_examples} examples, allowed are 1 to {self.max_examples}")
        if offer.steps > count_steps(offer.num_examples, training):
            raise UpdateRefused(f"claims {offer.steps} steps, more than {offer.num_examples} examples give")
        if offer.control_bytes > len(data):
            raise UpdateRefused(f"claims {offer.control_bytes} bytes of an update of {len(data)}")
        encoded, control = split_update(offer, data)
        return Contribution(
            client,
            offer.num_examples,
            offer.steps,
            self._decode(encoded, "update"),
            training=training,
            staleness=round_number - offer.round,
            control=self._decode(control, "control variate") if control else None,
            unclipped=offer.unclipped,
        )

    def _decode(self, data: memoryview, what: str) -> SparseOrDense:
        try:
            decoded = decode(data, self.limits)
        except CodecError as error:
            raise UpdateRefused(f"the {what} does not decode: {error}") from error
        if decoded.num_parameters != self.num_parameters:
            raise UpdateRefused(
                f"the {what} has {decoded.num_parameters} parameters, the model has {self.num_parameters}"
            )
        return decoded


def accepted_row(client: str, offer: Offer, *, round_number: int) -> ClientRow:
    """The row of a client whose update counts."""
    return ClientRow(
        round=round_number,
        staleness=round_number - offer.round,
        client=client,
        status="accepted",
        num_examples=offer.num_examples,
        steps=offer.steps,
        loss=_finite(offer.metrics.get("loss")),
        accuracy=_finite(offer.metrics.get("accuracy")),
        update_bytes=offer.update.size,
        seconds=_finite(offer.resources.seconds) or 0.0,
        peak_memory_mb=_finite(offer.resources.peak_memory_mb) or 0.0,
    )


def offer_in(envelope: bytes) -> Offer:
    """The offer in an envelope that was checked before.

    Raises:
        MessageError: there is something else in it.
    """
    offer = decode_from_client(unseal(envelope).body)
    if not isinstance(offer, Offer):
        raise MessageError("it comes with another message than its offer")
    return offer


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

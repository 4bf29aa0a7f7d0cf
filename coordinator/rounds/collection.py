"""What has come in for one round: checked, folded, journalled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.run.journal import Invited, Journal, RoundOpened, UpdateAccepted
from edgetrain.coordinator.run.journal_reading import JournalReader
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.secure.secure_records import (
    SecureClosed,
    SecureMasked,
    SecureOpened,
    SecureReceived,
    SecureRecord,
)
from edgetrain.coordinator.strategies import Contribution, ServerState, Strategy
from edgetrain.protocol import CodecError, MessageError
from edgetrain.protocol.codecs import Limits, SparseOrDense, decode
from edgetrain.protocol.messages import Offer, decode_from_client, split_update
from edgetrain.protocol.signing import unseal
from edgetrain.protocol.training import TrainingConfig, count_steps

# A journal in which nothing is whole is the torn beginning of one if it is no longer than this.
_LARGEST_FIRST = 4096


class Collection:
    """The accepted updates of a round.

    Args:
        strategy: folds them.
        num_parameters: length of the flat vector.
        state: the strategy's own, from the round before.
        limits: for decoding.
        max_examples: of one client.
    """

    def __init__(
        self, strategy: Strategy, num_parameters: int, state: ServerState, limits: Limits, max_examples: int
    ) -> None:
        self._strategy = strategy
        self._limits = limits
        self._max_examples = max_examples
        self._num_parameters = num_parameters
        self._journal: Journal | None = None
        self._round = 0
        self.partial: Any = strategy.init(num_parameters, state)
        # Accepted clients with the digests of their updates.
        self.digests: dict[str, bytes] = {}
        # Those whom an earlier process has invited.
        self.invited: set[str] = set()
        # Whether an earlier process has invited anybody, or nobody on purpose.
        self.was_invited = False
        self.rows: list[ClientRow] = []
        # Of secure aggregation, as an earlier process has noted them.
        self.secure_records: list[tuple[SecureRecord, bytes]] = []
        self.update_bytes = 0

    def open(self, directory: RunDirectory, opened: RoundOpened) -> RoundOpened:
        """Opens the round's journal; if an earlier process has left one, takes back what it accepted.

        Returns:
            How the round was opened: `opened`, or what an earlier process has noted, whose nonce counts.

        Raises:
            RunError: the journal is of another run or cannot be read or written.
        """
        self._round = opened.round
        path = directory.journal_path(opened.round)
        noted = directory.opened_round(opened.round)
        reader = JournalReader(path, noted)
        try:
            first = self._take_back(reader, opened, noted) if path.exists() else None
        except OSError as error:
            raise RunError(f"{path}: cannot read the journal: {error}") from error
        if first is None:
            # Noted, but not yet in the journal: nobody has been invited to it.
            first = noted if noted and _is_same(noted, opened) else opened
        if first != noted:
            directory.note_opened(first)
        if reader.length == 0 and reader.size > _LARGEST_FIRST:
            raise RunError(
                f"{path}: nothing in its {reader.size} bytes is whole; restore it from a copy, or move it away"
            )
        self._journal = Journal(path, length=reader.length, salt=first.salt)
        if reader.length == 0:
            # Not synced yet: how the round was opened is in the database, too.
            self._journal.append(first)
        return first

    def _take_back(self, reader: JournalReader, opened: RoundOpened, noted: RoundOpened | None) -> RoundOpened | None:
        """What an earlier process has accepted; how it opened the round, if it got so far."""
        first: RoundOpened | None = None
        for meta, payload in reader:
            if first is None:
                # The first record may be damaged; then the note beside the journal stands for it.
                first = meta if isinstance(meta, RoundOpened) else noted
                if first is None or not _is_same(first, opened):
                    raise RunError(
                        f"{reader.path}: is not the journal of this run's round {opened.round}; move it away"
                    )
            elif isinstance(meta, RoundOpened):
                raise RunError(f"{reader.path}: opens twice; restore it from a copy, or move it away")
            match meta:
                case Invited():
                    self.invited.update(meta.clients)
                    self.was_invited = True
                case UpdateAccepted():
                    try:
                        self._replay(meta, payload)
                    except (MessageError, UpdateRefused) as error:
                        raise RunError(
                            f"{reader.path}: the update of {meta.client} cannot be taken back: {error}. Go on with "
                            "the settings and the version of edgetrain that accepted it."
                        ) from error
                case SecureOpened() | SecureReceived() | SecureMasked() | SecureClosed():
                    self.secure_records.append((meta, payload))
        return first

    def _replay(self, meta: UpdateAccepted, update: bytes) -> None:
        offer = decode_from_client(unseal(meta.envelope).body)
        if not isinstance(offer, Offer):
            raise MessageError("it comes with another message than its offer")
        self._fold(meta.client, offer, update, meta.training)

    def invite(self, clients: Sequence[str]) -> None:
        """Notes who gets a plan. Not synced: only a power cut loses it, and then updates go back to their clients.

        Raises:
            RunError: the journal cannot be written.
        """
        assert self._journal is not None, "open comes first"
        self._journal.append(Invited(clients=tuple(clients)))

    def accept(self, client: str, offer: Offer, envelope: bytes, update: bytes, training: TrainingConfig) -> None:
        """Checks and folds an update and appends it to the journal; `commit` makes it durable.

        Args:
            client: whose.
            offer: of the update.
            envelope: the offer as it came.
            update: the bytes.
            training: what the client was told.

        Raises:
            UpdateRefused: it must not be folded. Nothing has changed.
            RunError: the journal cannot be written.
        """
        assert self._journal is not None, "open comes first"
        self._fold(client, offer, update, training)
        self._journal.append(UpdateAccepted(client=client, envelope=envelope, training=training), update)

    def note(self, record: SecureRecord, payload: bytes = b"") -> None:
        """Appends a step of secure aggregation to the journal; `commit` makes it durable.

        Raises:
            RunError: the journal cannot be written.
        """
        assert self._journal is not None, "open comes first"
        self._journal.append(record, payload)

    def fold_sum(self, contribution: Contribution, rows: Sequence[ClientRow], digests: dict[str, bytes]) -> None:
        """Folds what secure aggregation has summed, as one contribution.

        Args:
            contribution: the weighted mean, with the sum of the weights.
            rows: one for each client in it.
            digests: of their masked updates.

        Raises:
            UpdateRefused: the strategy will not have it.
        """
        self.partial = self._strategy.fold(self.partial, contribution)
        self.rows.extend(rows)
        self.update_bytes += sum(row.update_bytes for row in rows)
        self.digests |= digests

    def commit(self) -> None:
        """Returns when everything accepted is on the disk."""
        assert self._journal is not None, "open comes first"
        self._journal.commit()

    def close(self) -> None:
        """Closes the journal's file."""
        if self._journal:
            self._journal.close()

    def _fold(self, client: str, offer: Offer, data: bytes, training: TrainingConfig) -> None:
        if client in self.digests:
            raise UpdateRefused("an update of this client is already in the round")
        if not 1 <= offer.num_examples <= self._max_examples:
            raise UpdateRefused(f"claims {offer.num_examples} examples, allowed are 1 to {self._max_examples}")
        if offer.steps > count_steps(offer.num_examples, training):
            raise UpdateRefused(f"claims {offer.steps} steps, more than {offer.num_examples} examples give")
        if offer.control_bytes > len(data):
            raise UpdateRefused(f"claims {offer.control_bytes} bytes of an update of {len(data)}")
        encoded, control = split_update(offer, data)
        contribution = Contribution(
            client,
            offer.num_examples,
            offer.steps,
            self._decode(encoded, "update"),
            training=training,
            staleness=self._round - offer.round,
            control=self._decode(control, "control variate") if control else None,
            unclipped=offer.unclipped,
        )
        self.partial = self._strategy.fold(self.partial, contribution)
        self.digests[client] = offer.update.digest
        self.update_bytes += len(data)
        self.rows.append(
            ClientRow(
                round=self._round,
                staleness=self._round - offer.round,
                client=client,
                status="accepted",
                num_examples=offer.num_examples,
                steps=offer.steps,
                loss=_finite(offer.metrics.get("loss")),
                accuracy=_finite(offer.metrics.get("accuracy")),
                update_bytes=len(data),
                seconds=_finite(offer.resources.seconds) or 0.0,
                peak_memory_mb=_finite(offer.resources.peak_memory_mb) or 0.0,
            )
        )

    def _decode(self, data: bytes, what: str) -> SparseOrDense:
        try:
            decoded = decode(data, self._limits)
        except CodecError as error:
            raise UpdateRefused(f"the {what} does not decode: {error}") from error
        if decoded.num_parameters != self._num_parameters:
            raise UpdateRefused(
                f"the {what} has {decoded.num_parameters} parameters, the model has {self._num_parameters}"
            )
        return decoded


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_same(first: RoundOpened, opened: RoundOpened) -> bool:
    return (first.run, first.round, first.parameters) == (opened.run, opened.round, opened.parameters)

"""What has come in for one round: checked, folded, journalled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from edgetrain.coordinator.beside import Beside
from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.rounds.contributions import Checks, accepted_row, offer_in
from edgetrain.coordinator.run.journal import Invited, Journal, RoundOpened, UpdateAccepted
from edgetrain.coordinator.run.journal_reading import JournalReader
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.run.segments import lock_segment, read_segment, segments_of
from edgetrain.coordinator.secure.records import (
    SecureClosed,
    SecureMasked,
    SecureOpened,
    SecureReceived,
    SecureRecord,
)
from edgetrain.coordinator.strategies import Contribution, ServerState, Strategy
from edgetrain.protocol import MessageError
from edgetrain.protocol.codecs import Limits
from edgetrain.protocol.messages import Offer
from edgetrain.protocol.training import TrainingConfig

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
        self._checks = Checks(num_parameters, limits, max_examples)
        self._journal: Journal | None = None
        # What makes the beginning of the journal durable, while the clients train.
        self._syncing: Beside[None] | None = None
        # Where several processes have a part of the journal each.
        self._lock: BinaryIO | None = None
        self._round = 0
        # How the round was opened.
        self.opened: RoundOpened
        self.partial: Any = strategy.init(num_parameters, state)
        # Accepted clients with the digests of their updates.
        self.digests: dict[str, bytes] = {}
        # Those whose updates are in `partial`; not those that are in the sums of workers.
        self.folded: list[str] = []
        # Those whom an earlier process has invited.
        self.invited: set[str] = set()
        # Whether an earlier process has invited anybody, or nobody on purpose.
        self.was_invited = False
        self.rows: list[ClientRow] = []
        # Of secure aggregation, as an earlier process has noted them.
        self.secure_records: list[tuple[SecureRecord, bytes]] = []
        self.update_bytes = 0

    def open(self, directory: RunDirectory, opened: RoundOpened, *, workers: int = 0) -> RoundOpened:
        """Opens the round's journal; if an earlier process has left one, takes back what it accepted.

        Args:
            directory: of the run.
            opened: how the round is opened.
            workers: that will take up their segments; what other segments hold is folded here.

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
            # Not synced yet: `invite` begins that.
            self._journal.append(first)
        for worker, segment in segments_of(path).items():
            if worker >= workers:
                self.fold_segment(segment, first)
            else:
                self.list_segment(segment, first)
        self.opened = first
        return first

    def open_segment(self, path: Path, opened: RoundOpened) -> None:
        """Opens a worker's segment of the round's journal instead; takes back what is in it, as `open` does.

        Raises:
            RunError: it is of another round, or cannot be read or written.
        """
        self._round, self.opened = opened.round, opened
        reader = JournalReader(path, opened)
        try:
            self._lock = lock_segment(path)
            if path.exists():
                self._take_back(reader, opened, opened)
        except OSError as error:
            raise RunError(f"{path}: cannot read the journal: {error}") from error
        self._journal = Journal(path, length=reader.length, salt=opened.salt)
        if reader.length == 0:
            self._journal.append(opened)

    def list_segment(self, path: Path, opened: RoundOpened) -> list[tuple[Offer, ClientRow]]:
        """The updates that are whole in a segment that nobody writes to any more: from now on they count.

        They are not folded: whoever opens the segment next does that. Those that counted before are left out.

        Raises:
            RunError: it cannot be read.
        """
        counted = []
        for meta, _ in read_segment(path, opened):
            if meta.client not in self.digests:
                offer = offer_in(meta.envelope)
                counted.append((offer, self.note_taken(meta.client, offer)))
        return counted

    def fold_segment(self, path: Path, opened: RoundOpened) -> None:
        """Folds what is in a segment that nobody else will fold.

        Raises:
            RunError: it cannot be read.
        """
        for meta, update in read_segment(path, opened):
            try:
                offer = offer_in(meta.envelope)
                contribution = self._contribution(meta.client, offer, update, meta.training)
                self.partial = self._strategy.fold(self.partial, contribution)
            except (MessageError, UpdateRefused) as error:
                raise _not_taken_back(path, meta.client, error) from error
            self.folded.append(meta.client)
            if meta.client not in self.digests:
                self.note_taken(meta.client, offer)

    def note_taken(self, client: str, offer: Offer) -> ClientRow:
        """An update counts that a worker has folded and journalled; its row."""
        self.digests[client] = offer.update.digest
        self.update_bytes += offer.update.size
        row = accepted_row(client, offer, round_number=self._round)
        self.rows.append(row)
        return row

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
                        self._fold(meta.client, offer_in(meta.envelope), payload, meta.training)
                    except (MessageError, UpdateRefused) as error:
                        raise _not_taken_back(reader.path, meta.client, error) from error
                case SecureOpened() | SecureReceived() | SecureMasked() | SecureClosed():
                    self.secure_records.append((meta, payload))
        return first

    def invite(self, clients: Sequence[str]) -> None:
        """Notes who gets a plan. It is not waited for: what a power cut takes away of it, it takes within milliseconds.

        Raises:
            RunError: the journal cannot be written.
        """
        assert self._journal is not None, "open comes first"
        self._end_sync()
        self._journal.append(Invited(clients=tuple(clients)))
        self._journal.flush()
        self._syncing = Beside(self._journal.commit)

    def accept(
        self, client: str, offer: Offer, envelope: bytes, update: bytes | memoryview, training: TrainingConfig
    ) -> ClientRow:
        """Checks and folds an update and appends it to the journal; `commit` makes it durable.

        Args:
            client: whose.
            offer: of the update.
            envelope: the offer as it came.
            update: the bytes.
            training: what the client was told.

        Returns:
            Its row.

        Raises:
            UpdateRefused: it must not be folded. Nothing has changed.
            RunError: the journal cannot be written.
        """
        assert self._journal is not None, "open comes first"
        row = self._fold(client, offer, update, training)
        self._journal.append(UpdateAccepted(client=client, envelope=envelope, training=training), update)
        return row

    def note(self, record: SecureRecord, payload: bytes = b"") -> None:
        """Appends a step of secure aggregation to the journal; `commit` makes it durable.

        It outlives this process already: nobody sends it again before the phase is over.

        Raises:
            RunError: the journal cannot be written.
        """
        assert self._journal is not None, "open comes first"
        self._journal.append(record, payload)
        self._journal.flush()

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
        """Returns when everything accepted is on the disk.

        Raises:
            RunError: the disk did not take it.
        """
        assert self._journal is not None, "open comes first"
        self._end_sync()
        self._journal.commit()

    def _end_sync(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing:
            syncing.result()

    def close(self) -> None:
        """Closes the journal's file."""
        if self._syncing:
            self._syncing.join()
        if self._journal:
            self._journal.close()
        if self._lock:
            self._lock.close()

    def _fold(self, client: str, offer: Offer, data: bytes | memoryview, training: TrainingConfig) -> ClientRow:
        if client in self.digests:
            raise UpdateRefused("an update of this client is already in the round")
        self.partial = self._strategy.fold(self.partial, self._contribution(client, offer, data, training))
        self.folded.append(client)
        return self.note_taken(client, offer)

    def _contribution(
        self, client: str, offer: Offer, data: bytes | memoryview, training: TrainingConfig
    ) -> Contribution:
        return self._checks.contribution(client, offer, memoryview(data), training, round_number=self._round)


def _is_same(first: RoundOpened, opened: RoundOpened) -> bool:
    return (first.run, first.round, first.parameters) == (opened.run, opened.round, opened.parameters)


def _not_taken_back(path: Path, client: str, error: Exception) -> RunError:
    return RunError(
        f"{path}: the update of {client} cannot be taken back: {error}. Go on with the settings and the version of "
        "edgetrain that accepted it."
    )

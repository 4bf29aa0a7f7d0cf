"""Updates on their way in: offered, uploaded, folded, and what their senders are told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from edgetrain.coordinator import events
from edgetrain.coordinator.audit import AuditLog, records
from edgetrain.coordinator.beside import Beside
from edgetrain.coordinator.clients.refusals import Kind, Refusals
from edgetrain.coordinator.clients.roster import ClientRecord, Roster
from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.agenda import Agenda
from edgetrain.coordinator.rounds.open_round import OpenRound, Upload
from edgetrain.coordinator.rounds.state import Part
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.coordinator.secure.round import SecureRound
from edgetrain.coordinator.workers.foreman import Foreman
from edgetrain.coordinator.workers.pieces import RemotePieces
from edgetrain.protocol import BlobError
from edgetrain.protocol.blobs import HEADER_BYTES, MAX_CHUNK_BYTES, Assembler, parse_chunk
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.messages import Offer, Secure, Verdict, Want
from edgetrain.protocol.partial import IN_MEMORY_BYTES, assemble, forget_partial_blobs
from edgetrain.protocol.training import TrainingConfig

# An upload that has not moved for so long is asked for again; twice as long the next time, up to a maximum.
STALL_SECONDS = 3.0
MAX_STALL_SECONDS = 60.0
MAX_RANGES = 512


class Uploads:
    """Handles offers and chunks. Its callers have checked who sent them.

    Args:
        run: id of the run.
        agenda: what is open.
        post: for answers.
        roster: the clients.
        training: how a client trains in the open round, also for one that has not said Hello yet; noted there.
        come_back: in how many seconds a client whose update was accepted should come back, see `pace`.
        max_update_bytes: of one update.
        directory: for updates on their way in; what is there is taken up when its client offers it again.
        observe: is told what happens.
        audit: the run's log.
        refusals: keeps the books on who was refused.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        run: bytes,
        agenda: Agenda,
        post: Post,
        roster: Roster,
        training: Callable[[OpenRound, str], TrainingConfig],
        come_back: Callable[[str], float],
        max_update_bytes: int,
        directory: Path,
        observe: events.Observer,
        audit: AuditLog,
        refusals: Refusals,
        clock: Callable[[], float],
    ) -> None:
        self._run = run
        self._agenda = agenda
        self._post = post
        self._roster = roster
        self._training = training
        self.come_back = come_back
        self._max_update_bytes = max_update_bytes
        self._uploads = directory
        self._observe = observe
        self._audit = audit
        self._refusals = refusals
        self._clock = clock
        # Verdicts that wait for the journal to be synced.
        self._verdicts: list[tuple[str, Verdict]] = []
        self._syncing: Beside[None] | None = None
        # What sends those that are being signed meanwhile, and those that are covered by the sync.
        self._signed: list[Callable[[], None]] = []
        self._sending: list[Callable[[], None]] = []
        # Whether what an earlier process has left is gone.
        self._tidied = False
        # Leads the workers, where they take the updates.
        self.foreman: Foreman | None = None

    def on_offer(self, record: ClientRecord, offer: Offer, envelope: bytes) -> None:
        """A client has an update for us. `envelope` is the offer as it came, signed."""
        client, current = record.name, self._agenda.current
        in_round = current.collection.digests.get(client) if current else None
        if offer.update.digest == in_round or record.last_accepted == (offer.round, offer.update.digest):
            # A duplicate of what is already in: say so once more.
            self._verdicts.append((client, accepted_verdict(offer, self.come_back(client))))
        elif offer.run != self._run:
            self._reject(client, offer, "replay", "is of another run")
        elif current and offer.round == current.state.number and offer.nonce not in current.nonces:
            self._reject(client, offer, "replay", f"round {offer.round} has another nonce")
        elif not current or not current.admits(offer.round, offer.nonce):
            self._reject(client, offer, "stale_round", f"round {offer.round} is closed: too late")
        elif current.secure and current.secure.holds(client, offer.update.digest):
            # In the sum; what becomes of that is not known yet.
            current.secure.remind(client)
        elif objection := self._objection(client, offer, current):
            if objection[0] != "not_invited":
                current.state.advance(client, Part.REFUSED)
            current.drop_upload(client)
            self._reject(client, offer, *objection)
        else:
            known = current.uploads.get(client)
            if known is not None and known.in_work:
                # Its verdict is on the way; another update of the same client waits for that.
                return
            if known is not None and known.offer.update == offer.update:
                # It has lost the connection, or its patience.
                self._ask_for(client, known)
            else:
                if known is not None:
                    known.assembler.discard()
                upload = current.uploads[client] = self._open_upload(client, offer, envelope)
                if self.foreman:
                    # Noted before a worker is told, with the update.
                    self._training_of(current, client)
                    self.foreman.on_offered(client, upload)
                if upload.assembler.begun:
                    # Begun before a restart. Else its chunks follow the offer, or are asked for.
                    self._ask_for(client, upload)
            current.state.advance(client, Part.COLLECTING)

    def _open_upload(self, client: str, offer: Offer, envelope: bytes) -> Upload:
        if not self.foreman and offer.update.size <= IN_MEMORY_BYTES:
            return Upload(offer, envelope, Assembler(offer.update, limit=self._max_update_bytes), self._clock())
        # A directory each: two who offer the same bytes must not share a file.
        directory = self._uploads / client
        put_together = RemotePieces if self.foreman else assemble
        try:
            assembler = put_together(offer.update, directory, limit=self._max_update_bytes)
        except OSError as error:
            raise RunError(f"{directory}: cannot be used: {error}") from error
        return Upload(offer, envelope, assembler, self._clock())

    def _objection(self, client: str, offer: Offer, current: OpenRound) -> tuple[Kind, str] | None:
        if client in current.collection.digests:
            return "replay", "an update of this client is already in the round"
        if client not in current.state.parts:
            return "not_invited", "not invited to this round"
        if not 0 < offer.update.size <= self._max_update_bytes:
            return "oversize", f"the update has {offer.update.size} bytes, allowed are 1 to {self._max_update_bytes}"
        if current.secure and (reason := current.secure.objection(client, offer.update.size)):
            return "secure_aggregation", reason
        return None

    def on_chunk(self, client: str, payload: bytes) -> None:
        """A piece of an update.

        Raises:
            BlobError: it is none.
            RunError: the disk did not take it.
        """
        current = self._agenda.current
        upload = current.uploads.get(client) if current else None
        if current is None or upload is None or isinstance(upload.assembler, RemotePieces):
            return  # late, or ahead of its offer: it will be asked for if it is needed
        if len(payload) > MAX_CHUNK_BYTES:
            raise BlobError(f"a chunk of {len(payload)} bytes exceeds the limit of {MAX_CHUNK_BYTES}")
        chunk = parse_chunk(payload)
        if chunk.digest != upload.offer.update.digest:
            return
        upload.moved_at, upload.stalls = self._clock(), 0
        try:
            if not upload.assembler.add(chunk):
                return
        except OSError as error:
            raise RunError(f"{self._uploads}: cannot store an update: {error}") from error
        self._take(client, current, upload)

    def _take(self, client: str, current: OpenRound, upload: Upload) -> None:
        """An update has arrived."""
        del current.uploads[client]
        offer = upload.offer
        if current.secure:
            self._on_masked(current.secure, client, upload)
            return
        try:
            training = self._training_of(current, client)
            row = current.collection.accept(client, offer, upload.envelope, _finish(upload), training)
        except (UpdateRefused, BlobError) as error:
            current.state.advance(client, Part.REFUSED)
            self._reject(client, offer, "bad_update", str(error))
            return
        self._count(current, offer, row)

    def _training_of(self, current: OpenRound, client: str) -> TrainingConfig:
        # A client that was invited before a restart: what its plan says, it said then.
        return current.trainings.get(client) or self._training(current, client)

    def _count(self, current: OpenRound, offer: Offer, row: ClientRow) -> None:
        """An update is in the sum."""
        client = row.client
        record = self._roster[client]
        record.last_accepted = (offer.round, offer.update.digest)
        record.resources, record.state = offer.resources, offer.state
        current.durations[client] = self._clock() - current.invited.get(client, self._clock())
        current.state.advance(client, Part.ACCEPTED)
        self._verdicts.append((client, accepted_verdict(offer, self.come_back(client))))
        self._audit.append(accepted_record(row, offer.update.digest))
        accepted = len(current.collection.digests)
        self._observe(events.UpdateAccepted(offer.round, client, offer.update.size, accepted))

    # --- updates that arrive at workers --------------------------------------------------------------

    def on_arrived(self, client: str, num_bytes: int) -> bool:
        """See `workers.listener.Listener`."""
        if record := self._roster.get(client):
            record.bytes_up += num_bytes + HEADER_BYTES
        if self._refusals.banned(client):
            return False
        upload = self._agenda.current.uploads.get(client) if self._agenda.current else None
        if upload:
            upload.moved_at, upload.stalls = self._clock(), 0
        return True

    def on_malformed(self, client: str, num_bytes: int, reason: str) -> None:
        """See `workers.listener.Listener`."""
        if not self._refusals.banned(client):
            self._refusals.message(client, "oversize" if num_bytes > MAX_CHUNK_BYTES else "malformed", reason)

    def on_counted(self, offer: Offer, row: ClientRow) -> None:
        """See `workers.listener.Listener`."""
        if current := self._agenda.current:
            current.uploads.pop(row.client, None)
            self._count(current, offer, row)

    def on_refused(self, client: str, offer: Offer, reason: str) -> None:
        """See `workers.listener.Listener`."""
        if current := self._agenda.current:
            current.uploads.pop(client, None)
            current.state.advance(client, Part.REFUSED)
            self._reject(client, offer, "bad_update", reason)

    def ask_again(self, client: str, upload: Upload) -> None:
        """See `workers.listener.Listener`."""
        self._ask_for(client, upload)

    # --- secure aggregation --------------------------------------------------------------------------

    def _on_masked(self, secure: SecureRound, client: str, upload: Upload) -> None:
        try:
            secure.on_masked(client, upload.offer, upload.envelope, _finish(upload))
        except (SecureAggregationError, BlobError) as error:
            self._reject(client, upload.offer, "secure_aggregation", str(error))
        else:
            record = self._roster[client]
            record.resources, record.state = upload.offer.resources, upload.offer.state

    def on_secure(self, record: ClientRecord, message: Secure) -> None:
        """A step of secure aggregation."""
        current = self._agenda.current
        if not current or not current.secure or not current.admits(message.round, message.nonce):
            return
        if record.name not in current.state.parts:
            self._refusals.message(record.name, "not_invited", "not invited to this round", signed=True)
            return
        try:
            current.secure.on_message(record.name, record.public_key, message.body)
        except SecureAggregationError as error:
            self._refusals.message(record.name, "secure_aggregation", str(error), signed=True)
            return
        current.state.advance(record.name, Part.COLLECTING)

    def _reject(self, client: str, offer: Offer, kind: Kind, reason: str) -> None:
        if self._agenda.current:
            self._agenda.current.refused += 1
            self._agenda.current.reasons[client] = reason
        self._refusals.update(client, kind, reason, offer)
        verdict = Verdict(round=offer.round, digest=offer.update.digest, accepted=False, reason=reason[:1000])
        self._post.send(client, verdict)

    def sign_verdicts(self) -> None:
        """Begins to sign the verdicts that wait, some at a time, which nobody gets before the journal is synced."""
        if self._verdicts:
            verdicts, self._verdicts = self._verdicts, []
            self._signed.append(self._post.begin(verdicts))

    def begin_sync(self) -> None:
        """Begins to sync the journal, if somebody waits for it: `send_verdicts` then sends the verdicts."""
        if self.foreman:
            self.foreman.flush()
        self.sign_verdicts()
        if not self._signed:
            return
        self._sending, self._signed = self._signed, []
        if self._agenda.current:
            self._syncing = Beside(self._agenda.current.collection.commit)

    def send_verdicts(self) -> None:
        """When the journal is synced, tells all whose updates `begin_sync` has covered.

        Raises:
            RunError: the disk did not take the journal; then nobody is told anything.
        """
        sending, self._sending = self._sending, []
        if self._syncing:
            syncing, self._syncing = self._syncing, None
            syncing.result()
        for send in sending:
            send()

    def ask_for_stalled(self) -> None:
        """Asks for the missing parts of uploads that have stopped."""
        now = self._clock()
        if self.foreman:
            self.foreman.end_hanging()
        for client, upload in self._agenda.current.uploads.items() if self._agenda.current else ():
            if now - upload.moved_at >= min(STALL_SECONDS * 2.0**upload.stalls, MAX_STALL_SECONDS):
                upload.stalls = min(upload.stalls + 1, 10)
                self._ask_for(client, upload)

    def forget(self, closed: OpenRound, *, asynchronous: bool) -> None:
        """Deletes what nobody will send the rest of, when a round has closed.

        Args:
            closed: the round.
            asynchronous: whether its clients go on, and their uploads with them.
        """
        if not asynchronous:
            for client in list(closed.uploads):
                closed.drop_upload(client)
        if self._tidied:
            return
        # Once: what an earlier process has left, and nobody offered again.
        self._tidied = True
        for directory in self._uploads.glob("*"):
            upload = closed.uploads.get(directory.name)
            forget_partial_blobs(directory, keep=[upload.offer.update.digest] if upload else [])
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _ask_for(self, client: str, upload: Upload) -> None:
        upload.moved_at = self._clock()
        if upload.in_work:
            return
        missing = tuple(upload.assembler.missing()[:MAX_RANGES])
        self._post.send(client, Want(digest=upload.offer.update.digest, ranges=missing))


def accepted_record(row: ClientRow, digest: bytes, *, from_journal: bool = False) -> records.Accepted:
    """What the audit log says of an update that is in the sum."""
    return records.Accepted(
        client=row.client,
        round=row.round - row.staleness,
        digest=digest.hex(),
        bytes=row.update_bytes,
        num_examples=row.num_examples,
        from_journal=from_journal,
    )


def _finish(upload: Upload) -> bytes:
    assert not isinstance(upload.assembler, RemotePieces), "a worker has it"
    try:
        return upload.assembler.finish()
    except OSError as error:
        raise RunError(f"cannot read an update that has arrived: {error}") from error


def accepted_verdict(offer: Offer, come_back: float) -> Verdict:
    """What a client is told whose update is in the sum.

    Args:
        offer: of the update.
        come_back: in so many seconds; 0 for: stay.
    """
    return Verdict(round=offer.round, digest=offer.update.digest, accepted=True, come_back_seconds=come_back)

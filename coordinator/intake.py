"""The coordinator's incoming mail: who may say what, and what follows from it.

Everything that arrives is hostile until its signature, its sender and its round have been checked.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

from edgetrain import __version__
from edgetrain.coordinator import events
from edgetrain.coordinator.audit import AuditLog, records
from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients.clients import ClientRecord, Roster
from edgetrain.coordinator.clients.enrolments import Enrolments
from edgetrain.coordinator.clients.refusals import Kind, Refusals
from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.open_round import OpenRound, Upload
from edgetrain.coordinator.rounds.rounds import Part
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.coordinator.secure.secure_round import SecureRound
from edgetrain.protocol import BlobError, MessageError, SignatureError
from edgetrain.protocol.blobs import parse_chunk
from edgetrain.protocol.codecs import CodecSpec
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.messages import (
    Decline,
    Goodbye,
    Hello,
    Offer,
    Plan,
    Ready,
    Refusal,
    Report,
    Secure,
    Verdict,
    Want,
    Welcome,
    decode_from_client,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.partial import assemble, forget_partial_blobs
from edgetrain.protocol.signing import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, VersionError, unseal, verify
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport import Received

logger = logging.getLogger(__name__)

# An upload that has not moved for so long is asked for again; twice as long the next time, up to a maximum.
STALL_SECONDS = 3.0
MAX_STALL_SECONDS = 60.0
MAX_RANGES = 512
# Brokers that carry larger messages are rare, and clients that send them rarer.
MAX_CHUNK_BYTES = 1 << 20
# What a codec can always be negotiated down to.
EVERYONES_STAGES = CodecSpec().stages


class Intake:
    """Handles what clients send. Owned by the coordinator's thread.

    Args:
        topics: of the federation.
        run: id of the run.
        bundle: digest of the bundle.
        post: for answers.
        blobs: for `Want`.
        roster: the clients.
        plan: makes the open round's plan for a client, for those who may have lost it.
        training: how a client trains in the open round; unlike the plan, also for one that has not said Hello yet.
        max_update_bytes: of one update.
        uploads: directory for updates on their way in; what is there is taken up when its client offers it again.
        observe: is told what happens.
        audit: the run's log.
        refusals: keeps the books on who was refused.
        enrolments: who may take part, or None for everybody.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        run: bytes,
        bundle: bytes,
        post: Post,
        blobs: BlobServer,
        roster: Roster,
        plan: Callable[[OpenRound, str], Plan],
        training: Callable[[OpenRound, str], TrainingConfig],
        max_update_bytes: int,
        uploads: Path,
        observe: events.Observer,
        audit: AuditLog,
        refusals: Refusals,
        enrolments: Enrolments | None,
        clock: Callable[[], float],
    ) -> None:
        self._topics = topics
        self._run = run
        self._bundle = bundle
        self._post = post
        self._blobs = blobs
        self._roster = roster
        self._plan = plan
        self._training = training
        self._max_update_bytes = max_update_bytes
        self._uploads = uploads
        self._observe = observe
        self._audit = audit
        self.refusals = refusals
        self._enrolments = enrolments
        self._clock = clock
        # The round that is open, if one is.
        self.current: OpenRound | None = None
        # The evaluation that clients are asked for, and what they reported.
        self.evaluation_plan: Plan | None = None
        self.reports: dict[str, Report] = {}
        # Verdicts that wait for the journal to be synced.
        self._verdicts: list[tuple[str, Verdict]] = []
        # When a client whose update was accepted should come back, see `pace`.
        self.come_back: Callable[[str], float] = lambda _client: 0.0

    def handle(self, event: Received) -> None:
        """Takes one message. Never raises for what a client sent.

        Raises:
            RunError: the journal cannot be written.
        """
        sender = self._topics.sender(event.topic)
        if sender is None:
            return
        client, kind = sender
        if record := self._roster.get(client):
            record.bytes_up += len(event.payload)
        if self.refusals.banned(client):
            return
        try:
            if kind == "blob":
                self._on_chunk(client, event.payload)
            elif kind == "message":
                self._on_message(client, event.payload)
        except VersionError as error:
            self.refusals.message(
                client,
                "version",
                f"this client speaks protocol version {error.version}, the coordinator {PROTOCOL_VERSION}: "
                "install the same version of edgetrain on both",
            )
            self._post.send(client, Refusal(reason=f"the coordinator runs edgetrain {__version__}: {error}"))
        except SignatureError as error:
            self.refusals.message(client, "forged", str(error))
        except (MessageError, BlobError) as error:
            self.refusals.message(client, _kind(event.payload, kind), str(error))
        if self.current:
            self.refusals.drop_banned(self.current)

    def send_verdicts(self) -> None:
        """Syncs the journal once, then tells all whose updates that covers.

        Raises:
            RunError: the disk did not take the journal; then nobody is told anything.
        """
        if not self._verdicts:
            return
        if self.current:
            self.current.collection.commit()
        for client, verdict in self._verdicts:
            self._post.send(client, verdict)
        self._verdicts.clear()

    def ask_for_stalled(self) -> None:
        """Asks for the missing parts of uploads that have stopped."""
        now = self._clock()
        for client, upload in self.current.uploads.items() if self.current else ():
            if now - upload.moved_at >= min(STALL_SECONDS * 2.0**upload.stalls, MAX_STALL_SECONDS):
                upload.stalls = min(upload.stalls + 1, 10)
                self._ask_for(client, upload)

    def forget_uploads(self) -> None:
        """Deletes what nobody will send the rest of."""
        uploads = self.current.uploads if self.current else {}
        for directory in self._uploads.glob("*"):
            upload = uploads.get(directory.name)
            forget_partial_blobs(directory, keep=[upload.offer.update.digest] if upload else [])
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _ask_for(self, client: str, upload: Upload) -> None:
        upload.moved_at = self._clock()
        missing = tuple(upload.assembler.missing()[:MAX_RANGES])
        self._post.send(client, Want(digest=upload.offer.update.digest, ranges=missing))

    # --- messages ------------------------------------------------------------------------------------

    def _on_message(self, client: str, payload: bytes) -> None:
        envelope = unseal(payload)
        if envelope.sender != client:
            self.refusals.message(client, "foreign_id", f"claims to be from {envelope.sender!r}")
            return
        message = decode_from_client(envelope.body)
        if isinstance(message, Hello):
            verify(envelope, self._topics.federation, message.public_key)
            self._on_hello(client, message)
            return
        record = self._roster.get(client)
        if record and self._enrolments and (objection := self._enrolments.objection(client, record.public_key)):
            self.refusals.message(client, *objection)
            return
        if record is None:
            # It was here before we were: an announcement lets it introduce itself again.
            self._post.announce("open", client=client)
            return
        verify(envelope, self._topics.federation, record.public_key)
        match message:
            case Ready():
                self._on_ready(record, message)
            case Decline():
                self._on_decline(record, message)
            case Offer():
                self._on_offer(record, message, payload)
            case Want():
                self._on_want(record, message)
            case Secure():
                self._on_secure(record, message)
            case Report():
                self._on_report(record, message)
            case Goodbye():
                self._on_goodbye(record, message)

    def _on_hello(self, client: str, hello: Hello) -> None:
        record = self._roster.get(client)
        if objection := self._objection_to_hello(client, record, hello):
            kind, reason = objection
            # It signed with the key that it shows, which need not be the one that the name belongs to.
            self.refusals.message(client, kind, reason)
            self._post.send(client, Refusal(reason=reason, connection=hello.connection))
            return
        if record and hello.connection in record.earlier_connections:
            self.refusals.message(client, "replay", "a copy of the Hello of an earlier connection")
            return
        if record is None:
            record = ClientRecord(client, hello.public_key)
            self._roster.add(record)
            if not self._enrolments:
                key = hello.public_key.hex()
                self._audit.append(records.Enrolled(client=client, public_key=key, by="first use"))
        # Enrolled anew, it has another key.
        record.public_key = hello.public_key
        if record.connection != hello.connection:
            # A new process, or its first Hello; a copy of the Hello of this connection changes nothing.
            if record.ready:
                self._observe(events.ClientLeft(client, "came back anew"))
            if record.connection:
                record.earlier_connections.append(record.connection)
            record.ready = False
        record.connection = hello.connection
        record.device = hello.device
        record.stages = frozenset(hello.stages)
        record.online = True
        self._post.send(client, Welcome(run=self._run))

    def _objection_to_hello(self, client: str, record: ClientRecord | None, hello: Hello) -> tuple[Kind, str] | None:
        if self._enrolments and (objection := self._enrolments.objection(client, hello.public_key)):
            return objection
        if not self._enrolments and record and record.public_key != hello.public_key:
            return "not_enrolled", f"the name {client!r} belongs to another key in this run: choose another name"
        if missing := EVERYONES_STAGES - set(hello.stages):
            return "unfit", f"lacks codec stages that everyone has: {', '.join(sorted(missing))}"
        return None

    def dismiss(self, client: str, reason: str) -> None:
        """Sends a client away that may not take part any more; the round does not wait for it."""
        record = self._roster.get(client)
        if record is None:
            return
        was_ready = record.ready
        record.online = record.ready = False
        if self.current:
            self.current.uploads.pop(client, None)
            if self.current.state.waits_for(client):
                self.current.state.advance(client, Part.LOST)
        self._post.send(client, Refusal(reason=reason, connection=record.connection))
        if was_ready:
            self._observe(events.ClientLeft(client, reason))

    def _on_ready(self, record: ClientRecord, ready: Ready) -> None:
        if ready.connection is not None and not record.connection:
            # Known from an earlier process of ours: it has to say which connection this is.
            self._post.announce("open", client=record.name)
            return
        if ready.connection is not None and ready.connection != record.connection:
            self.refusals.message(record.name, "replay", "a Ready of an earlier connection", signed=True)
            return
        if ready.bundle != self._bundle:
            reason = "has another bundle than this run trains"
            self.refusals.message(record.name, "unfit", reason)
            self._post.send(record.name, Refusal(reason=reason, connection=record.connection))
            return
        if not record.ready:
            self._observe(events.ClientJoined(record.name, ready.num_examples))
        record.online = record.ready = True
        record.num_examples, record.runtime = ready.num_examples, ready.runtime
        record.state = ready.state
        current = self.current
        if current and current.state.parts.get(record.name) in {Part.INVITED, Part.TRAINING, Part.LOST}:
            # Back in the middle of a round: it may have lost the plan.
            current.state.advance(record.name, Part.INVITED)
            self._post.send(record.name, self._plan(current, record.name))
        elif current and current.secure and record.name in current.state.parts:
            current.secure.remind(record.name)
        elif self.evaluation_plan and record.name not in self.reports:
            self._post.send(record.name, self.evaluation_plan)

    def _on_decline(self, record: ClientRecord, decline: Decline) -> None:
        if self.current and self.current.admits(decline.round, decline.nonce):
            self.current.state.advance(record.name, Part.DECLINED)
            self.current.reasons[record.name] = decline.reason
            logger.info("%s declines round %d: %s", record.name, decline.round, decline.reason)

    def _on_want(self, record: ClientRecord, want: Want) -> None:
        current = self.current
        invited = current and current.state.parts.get(record.name) is Part.INVITED
        if current and invited and any(want.digest == blob.digest for blob in current.blobs):
            current.state.advance(record.name, Part.TRAINING)
        if not self._blobs.want(record.name, want.digest, want.ranges, self._clock(), want.chunk_bytes):
            logger.debug("%s wants a blob that is no more: %s", record.name, want.digest.hex()[:12])

    def _on_report(self, record: ClientRecord, report: Report) -> None:
        if not self.evaluation_plan or report.nonce != self.evaluation_plan.nonce:
            return
        if not all(math.isfinite(value) for value in report.metrics.values()):
            reason = "its report holds numbers that are not finite"
            self.refusals.message(record.name, "bad_report", reason, signed=True)
            return
        self.reports[record.name] = report
        record.resources = report.resources

    def _on_goodbye(self, record: ClientRecord, goodbye: Goodbye) -> None:
        if goodbye.connection != record.connection or not record.online:
            return
        was_ready = record.ready
        record.online = record.ready = False
        if self.current and self.current.state.waits_for(record.name):
            self.current.state.advance(record.name, Part.LOST)
        if was_ready:
            self._observe(events.ClientLeft(record.name, goodbye.reason))

    # --- updates -------------------------------------------------------------------------------------

    def _on_offer(self, record: ClientRecord, offer: Offer, envelope: bytes) -> None:
        client, current = record.name, self.current
        in_round = current.collection.digests.get(client) if current else None
        if offer.update.digest == in_round or record.last_accepted == (offer.round, offer.update.digest):
            # A duplicate of what is already in: say so once more.
            self._verdicts.append((client, _accepted(offer, self.come_back(client))))
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
            current.uploads.pop(client, None)
            self._reject(client, offer, *objection)
        else:
            known = current.uploads.get(client)
            if known is not None and known.offer.update == offer.update:
                # It has lost the connection, or its patience.
                self._ask_for(client, known)
            else:
                if known is not None:
                    known.assembler.discard()
                upload = current.uploads[client] = self._open_upload(client, offer, envelope)
                if upload.assembler.missing() != [(0, offer.update.size)]:
                    # Begun before a restart. Else its chunks follow the offer, or are asked for.
                    self._ask_for(client, upload)
            current.state.advance(client, Part.COLLECTING)

    def _open_upload(self, client: str, offer: Offer, envelope: bytes) -> Upload:
        # A directory each: two who offer the same bytes must not share a file.
        directory = self._uploads / client
        try:
            assembler = assemble(offer.update, directory, limit=self._max_update_bytes)
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

    def _on_chunk(self, client: str, payload: bytes) -> None:
        current = self.current
        upload = current.uploads.get(client) if current else None
        if current is None or upload is None:
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
            # A client that was invited before a restart: what its plan says, it said then.
            training = current.trainings.get(client) or self._training(current, client)
            current.collection.accept(client, offer, upload.envelope, _finish(upload), training)
        except (UpdateRefused, BlobError) as error:
            current.state.advance(client, Part.REFUSED)
            self._reject(client, offer, "bad_update", str(error))
            return
        record = self._roster[client]
        record.last_accepted = (offer.round, offer.update.digest)
        record.resources, record.state = offer.resources, offer.state
        current.durations[client] = self._clock() - current.invited.get(client, self._clock())
        current.state.advance(client, Part.ACCEPTED)
        self._verdicts.append((client, _accepted(offer, self.come_back(client))))
        self._audit.append(accepted_record(current.collection.rows[-1], offer.update.digest))
        accepted = current.state.count(Part.ACCEPTED)
        self._observe(events.UpdateAccepted(offer.round, client, offer.update.size, accepted))

    def _on_masked(self, secure: SecureRound, client: str, upload: Upload) -> None:
        try:
            secure.on_masked(client, upload.offer, upload.envelope, upload.assembler.finish())
        except (SecureAggregationError, BlobError) as error:
            self._reject(client, upload.offer, "secure_aggregation", str(error))
        else:
            record = self._roster[client]
            record.resources, record.state = upload.offer.resources, upload.offer.state

    def _on_secure(self, record: ClientRecord, message: Secure) -> None:
        current = self.current
        if not current or not current.secure or not current.admits(message.round, message.nonce):
            return
        if record.name not in current.state.parts:
            self.refusals.message(record.name, "not_invited", "not invited to this round", signed=True)
            return
        try:
            current.secure.on_message(record.name, record.public_key, message.body)
        except SecureAggregationError as error:
            self.refusals.message(record.name, "secure_aggregation", str(error), signed=True)
            return
        current.state.advance(record.name, Part.COLLECTING)

    def _reject(self, client: str, offer: Offer, kind: Kind, reason: str) -> None:
        if self.current:
            self.current.refused += 1
            self.current.reasons[client] = reason
        self.refusals.update(client, kind, reason, offer)
        verdict = Verdict(round=offer.round, digest=offer.update.digest, accepted=False, reason=reason[:1000])
        self._post.send(client, verdict)


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
    try:
        return upload.assembler.finish()
    except OSError as error:
        raise RunError(f"cannot read an update that has arrived: {error}") from error


def _kind(payload: bytes, kind: str) -> Kind:
    limit = MAX_MESSAGE_BYTES if kind == "message" else MAX_CHUNK_BYTES
    return "oversize" if len(payload) > limit else "malformed"


def _accepted(offer: Offer, come_back: float) -> Verdict:
    return Verdict(round=offer.round, digest=offer.update.digest, accepted=True, come_back_seconds=come_back)

"""The coordinator's incoming mail: who may say what, and what follows from it.

Everything that arrives is hostile until its signature, its sender and its round have been checked. That is done
here; who is here is then `Presence`'s to say, and what becomes of updates `Uploads`'.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from edgetrain import __version__
from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients.enrolments import Enrolments
from edgetrain.coordinator.clients.presence import Presence
from edgetrain.coordinator.clients.refusals import Kind, Refusals
from edgetrain.coordinator.clients.roster import ClientRecord, Roster
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.agenda import Agenda
from edgetrain.coordinator.rounds.state import Part
from edgetrain.coordinator.rounds.uploads import Uploads
from edgetrain.coordinator.signatures import Signatures
from edgetrain.protocol import BlobError, MessageError, SignatureError
from edgetrain.protocol.blobs import MAX_CHUNK_BYTES
from edgetrain.protocol.messages import (
    Decline,
    Goodbye,
    Hello,
    Offer,
    Ready,
    Refusal,
    Report,
    Secure,
    Want,
    decode_from_client,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, VersionError, unseal
from edgetrain.protocol.transport import Received

logger = logging.getLogger(__name__)


class Intake:
    """Handles what clients send. Owned by the coordinator's thread.

    Args:
        topics: of the federation.
        agenda: what is open.
        post: for answers.
        blobs: for `Want`.
        roster: the clients.
        presence: handles who comes and goes.
        uploads: handles updates.
        refusals: keeps the books on who was refused.
        signatures: checks them.
        enrolments: who may take part, or None for everybody.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        agenda: Agenda,
        post: Post,
        blobs: BlobServer,
        roster: Roster,
        presence: Presence,
        uploads: Uploads,
        refusals: Refusals,
        signatures: Signatures,
        enrolments: Enrolments | None,
        clock: Callable[[], float],
    ) -> None:
        self._topics = topics
        self._agenda = agenda
        self._post = post
        self._blobs = blobs
        self._roster = roster
        self._presence = presence
        self._uploads = uploads
        self._refusals = refusals
        self._signatures = signatures
        self._enrolments = enrolments
        self._clock = clock

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
        if self._refusals.banned(client):
            return
        try:
            if kind == "blob":
                self._uploads.on_chunk(client, event.payload)
            elif kind == "message":
                self._on_message(client, event.payload)
        except VersionError as error:
            self._refusals.message(
                client,
                "version",
                f"this client speaks protocol version {error.version}, the coordinator {PROTOCOL_VERSION}: "
                "install the same version of edgetrain on both",
            )
            self._post.send(client, Refusal(reason=f"the coordinator runs edgetrain {__version__}: {error}"))
        except SignatureError as error:
            self._refusals.message(client, "forged", str(error))
        except (MessageError, BlobError) as error:
            self._refusals.message(client, _kind(event.payload, kind), str(error))
        if self._agenda.current:
            self._refusals.drop_banned(self._agenda.current)

    def _on_message(self, client: str, payload: bytes) -> None:
        envelope = unseal(payload)
        if envelope.sender != client:
            self._refusals.message(client, "foreign_id", f"claims to be from {envelope.sender!r}")
            return
        message = decode_from_client(envelope.body)
        if isinstance(message, Hello):
            self._signatures.check(envelope, payload, message.public_key)
            self._presence.on_hello(client, message)
            return
        record = self._roster.get(client)
        if record and self._enrolments and (objection := self._enrolments.objection(client, record.public_key)):
            self._refusals.message(client, *objection)
            return
        if record is None:
            # It was here before we were: an announcement lets it introduce itself again.
            self._post.announce("open", client=client)
            return
        self._signatures.check(envelope, payload, record.public_key)
        match message:
            case Ready():
                self._presence.on_ready(record, message)
            case Decline():
                self._on_decline(record, message)
            case Offer():
                self._uploads.on_offer(record, message, payload)
            case Want():
                self._on_want(record, message)
            case Secure():
                self._uploads.on_secure(record, message)
            case Report():
                self._on_report(record, message)
            case Goodbye():
                self._presence.on_goodbye(record, message)

    def _on_decline(self, record: ClientRecord, decline: Decline) -> None:
        if self._agenda.current and self._agenda.current.admits(decline.round, decline.nonce):
            self._agenda.current.state.advance(record.name, Part.DECLINED)
            self._agenda.current.reasons[record.name] = decline.reason
            logger.info("%s declines round %d: %s", record.name, decline.round, decline.reason)

    def _on_want(self, record: ClientRecord, want: Want) -> None:
        current = self._agenda.current
        invited = current and current.state.parts.get(record.name) is Part.INVITED
        if current and invited and any(want.digest == blob.digest for blob in current.blobs):
            current.state.advance(record.name, Part.TRAINING)
        if not self._blobs.want(record.name, want.digest, want.ranges, self._clock(), want.chunk_bytes):
            logger.debug("%s wants a blob that is no more: %s", record.name, want.digest.hex()[:12])

    def _on_report(self, record: ClientRecord, report: Report) -> None:
        if not self._agenda.evaluation_plan or report.nonce != self._agenda.evaluation_plan.nonce:
            return
        if not all(math.isfinite(value) for value in report.metrics.values()):
            reason = "its report holds numbers that are not finite"
            self._refusals.message(record.name, "bad_report", reason, signed=True)
            return
        self._agenda.reports[record.name] = report
        record.resources = report.resources


def _kind(payload: bytes, kind: str) -> Kind:
    limit = MAX_MESSAGE_BYTES if kind == "message" else MAX_CHUNK_BYTES
    return "oversize" if len(payload) > limit else "malformed"

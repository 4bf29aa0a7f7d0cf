"""The session of secure aggregation in an open round: takes clients' messages, ends phases, passes things on.

Every step is in the journal before anyone hears of it, so another process goes on where this one was, and tells
nobody anything else than before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.contributions import offer_in
from edgetrain.coordinator.secure.config import SecureAggregationConfig
from edgetrain.coordinator.secure.records import (
    SecureClosed,
    SecureMasked,
    SecureOpened,
    SecureReceived,
    SecureRecord,
)
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.messages import BlobRef, Offer, Secure
from edgetrain.protocol.secure_aggregation import server as servers
from edgetrain.protocol.secure_aggregation.arithmetic import Total, dequantize, unpack
from edgetrain.protocol.secure_aggregation.masks import Masker, Words
from edgetrain.protocol.secure_aggregation.messages import (
    FromServer,
    RosterReady,
    decode_from_member,
    decode_settings,
    encode,
    session_digest,
)
from edgetrain.protocol.secure_aggregation.unmasking import unmask

logger = logging.getLogger(__name__)

# After a restart clients have so long to come back before they count as gone.
RETURN_SECONDS = 10.0


class SecureRound:
    """One session.

    Args:
        federation: its name.
        run: id of the run.
        number: of the round.
        nonce: of the round.
        work: what clients train, see `work_digest`.
        settings: as the plans have them.
        config: of secure aggregation.
        records: what an earlier process has noted of this session, after its `SecureOpened`.
        note: appends to the journal.
        commit: makes the journal durable.
        post: for messages.
        blobs: serves the roster.
        clients: who is online.
        clock: monotonic seconds.

    Raises:
        SecureAggregationError: the records are of another session.
    """

    def __init__(
        self,
        *,
        federation: str,
        run: bytes,
        number: int,
        nonce: bytes,
        work: bytes,
        settings: bytes,
        config: SecureAggregationConfig,
        records: Sequence[tuple[SecureRecord, bytes]],
        note: Callable[[SecureRecord, bytes], None],
        commit: Callable[[], None],
        post: Post,
        blobs: BlobServer,
        clients: Roster,
        clock: Callable[[], float],
    ) -> None:
        session = session_digest(
            federation=federation, run=run, round_number=number, nonce=nonce, work=work, settings=settings
        )
        self.settings = settings
        self.server = servers.Server(session=session, settings=settings)
        # Masked updates that are in the sum, by client.
        self.offers: dict[str, Offer] = {}
        # Blobs to remove with the round.
        self.blobs: list[BlobRef] = []
        self._run, self._number, self._nonce = run, number, nonce
        self._config = config
        self._note, self._commit = note, commit
        self._post, self._blob_server, self._clients, self._clock = post, blobs, clients, clock
        self._sum: Words | None = None
        for record, payload in records:
            self._apply(record, payload)
        self._phase_began = clock()
        # Who was here before a restart has not come back yet.
        self._returning_until = clock() + RETURN_SECONDS if self.server.phase != "advertise" else 0.0
        if self.server.roster:
            self._serve_roster()

    @property
    def advertised(self) -> list[str]:
        """Those who are in."""
        return sorted(self.server.peers) if not self.server.roster else list(self.server.cast.positions)

    @property
    def revealing(self) -> bool:
        """Whether clients have been asked for shares: from then on there may be a sum of their updates."""
        return self.server.phase in {"reveal", "done"}

    @property
    def survivors(self) -> list[str]:
        """Those whose updates are in the sum."""
        return servers.names(self.server, self.server.masked)

    # --- what comes in -------------------------------------------------------------------------------

    def on_message(self, client: str, identity: bytes, body: bytes) -> None:
        """Takes a client's message.

        Raises:
            SecureAggregationError: it does not fit. Nothing has changed.
            RunError: the journal cannot be written.
        """
        before = self.server
        record = SecureReceived(client=client, identity=identity, body=body)
        self._apply(record, b"")
        if self.server is before:
            # Sent again: it has not heard our answer.
            self.remind(client)
        else:
            self._note(record, b"")

    def holds(self, client: str, digest: bytes) -> bool:
        """Whether this masked update is in the sum."""
        return client in self.offers and self.offers[client].update.digest == digest

    def objection(self, client: str, size: int) -> str | None:
        """Why a masked update is not welcome, or None."""
        if reason := servers.admits_masked(self.server, client):
            return reason
        expected = self.server.cast.layout.payload_bytes
        return None if size == expected else f"a masked update of {size} bytes, expected are {expected}"

    def on_masked(self, client: str, offer: Offer, envelope: bytes, data: bytes) -> None:
        """Takes a masked update into the sum.

        Raises:
            SecureAggregationError: it does not fit. Nothing has changed.
            RunError: the journal cannot be written.
        """
        record = SecureMasked(client=client, envelope=envelope)
        self._add(client, offer, data)
        self._note(record, data)

    def _apply(self, record: SecureRecord, payload: bytes) -> None:
        match record:
            case SecureReceived():
                message = decode_from_member(record.body)
                self.server = servers.receive(self.server, record.client, record.identity, message)
            case SecureMasked():
                self._add(record.client, offer_in(record.envelope), payload)
            case SecureClosed():
                self.server = self._closed()
            case SecureOpened():
                raise SecureAggregationError("a session begins within another")

    def _add(self, client: str, offer: Offer, data: bytes) -> None:
        layout = self.server.cast.layout
        words = unpack(data, layout)
        self.server = servers.note_masked(self.server, client)
        if self._sum is None:
            self._sum = Masker(layout.length, layout.bits).zeros()
        self._sum += words
        self.offers[client] = offer

    # --- phases --------------------------------------------------------------------------------------

    def step(self, *, may_close_roster: Callable[[], bool], is_gone: Callable[[str], bool]) -> bool:
        """Ends the phase if it can be; to be called whenever something may have happened.

        Args:
            may_close_roster: whether whoever has advertised keys by now is enough; may raise, too.
            is_gone: whether a client has said that it will not go on.

        Returns:
            Whether the session is over and `result` has the sum.

        Raises:
            SecureAggregationError: too few are left; it is over without a sum, and nothing was revealed.
            RunError: the journal cannot be written.
        """
        if self.server.phase == "done":
            return True
        if self.server.phase == "advertise":
            if not may_close_roster():
                return False
        elif not self._is_time(is_gone):
            return False
        self.server = self._closed()
        self._note(SecureClosed(phase=self.server.phase), b"")
        self._commit()
        self._phase_began = self._clock()
        if self.server.phase == "share":
            self._serve_roster()
            logger.info(
                "round %d: secure aggregation of %d clients, %d neighbours each, threshold %d, modulo 2^%d",
                self._number,
                len(self.server.cast.roster.peers),
                self.server.cast.roster.neighbours,
                self.server.cast.roster.threshold,
                self.server.cast.layout.bits,
            )
        for client in self.server.asked:
            self._tell(client)
        return self.server.phase == "done"

    def _is_time(self, is_gone: Callable[[str], bool]) -> bool:
        server, now = self.server, self._clock()
        missing = server.asked - server.answered
        if not missing or now >= self._phase_began + self._config.phase_seconds:
            return True
        if now < self._returning_until:
            return False
        names = [name for name in servers.names(server, missing) if not is_gone(name)]
        online = any((record := self._clients.get(name)) and record.online for name in names)
        return not online and servers.has_enough(server)

    def _closed(self) -> servers.Server:
        return servers.close(
            self.server,
            dropout=self._config.max_dropout,
            neighbours=self._config.neighbours,
            threshold=self._config.threshold,
        )

    def remind(self, client: str) -> None:
        """Tells a client again what is wanted from it, if anything is."""
        position = self.server.cast.positions.get(client) if self.server.roster else None
        if position in self.server.asked - self.server.answered:
            self._tell(position)

    def _tell(self, client: int) -> None:
        server = self.server
        message: FromServer
        match server.phase:
            case "share":
                roster = blob_ref(server.roster)
                message = RosterReady(digest=roster.digest, size=roster.size)
            case "mask":
                message = servers.boxes_for(server, client)
            case "agree":
                message = servers.survivors_message(server)
            case _:
                message = servers.agreements_for(server, client)
        body = encode(message)
        self._post.send(server.name(client), Secure(run=self._run, round=self._number, nonce=self._nonce, body=body))

    def _serve_roster(self) -> None:
        reference = self._blob_server.add(self.server.roster)
        self.blobs.append(reference)
        self._blob_server.expect(reference, audience=len(self.server.asked))

    # --- the end -------------------------------------------------------------------------------------

    def result(self) -> Total:
        """The sum, without its masks.

        Raises:
            SecureAggregationError: shares are wrong, or the sum is none of honest clients. There is no sum.
        """
        assert self._sum is not None, "the session is over"
        settings = decode_settings(self.settings)
        words = unmask(self.server, self._sum)
        return dequantize(words, len(self.server.masked), settings.quantizer, self.server.cast.layout)

"""The coordinator's loop: takes events out of the transport's queue until something is done."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.chronicle import Chronicle
from edgetrain.coordinator.clients.known_clients import KnownClients
from edgetrain.coordinator.errors import StopRequested
from edgetrain.coordinator.intake import Intake
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.agenda import Agenda
from edgetrain.coordinator.rounds.uploads import Uploads
from edgetrain.coordinator.signatures import Look, Signatures
from edgetrain.protocol.transport import Connected, Disconnected, Event, Noticed, Received, Transport

logger = logging.getLogger(__name__)

# Events handled before the journal is synced: one sync serves them all. The verdicts go out when it has ended, at the
# latest after as many more.
BATCH_EVENTS = 512
# Of these, so many are taken out of the queue at a time, and so often ahead: their signatures are checked while those
# before are handled.
AHEAD_EVENTS, AHEAD_TIMES = 64, 3
# Upper bound of one wait for events, so that deadlines are looked at now and then.
POLL_SECONDS = 0.5


class Pump:
    """Handles events, and what is due by itself.

    Args:
        transport: connected.
        post: for announcements.
        blobs: has parts to send when their time comes.
        agenda: has deadlines.
        intake: handles what arrives.
        signatures: looks ahead.
        uploads: asked for when they stop, answered when they are safe.
        chronicle: is on disk before any verdict goes out.
        clients: saved before anyone hears that its update counts.
        check: looks at what people ask for; may raise.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        post: Post,
        blobs: BlobServer,
        agenda: Agenda,
        intake: Intake,
        signatures: Signatures,
        uploads: Uploads,
        chronicle: Chronicle,
        clients: KnownClients,
        check: Callable[[], object],
        clock: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._post = post
        self._blobs = blobs
        self._agenda = agenda
        self._intake = intake
        self._signatures = signatures
        self._uploads = uploads
        self._chronicle = chronicle
        self._clients = clients
        self._check = check
        self._clock = clock
        # As announced last: what whoever connects later is told.
        self._status: tuple[Literal["open", "paused", "ended"], str] = ("open", "")
        # What is handled next, with the looks at its signatures. Nobody may rely on the broker to have it still.
        self._ahead: deque[tuple[list[Event], Look]] = deque()

    def announce(self, status: Literal["open", "paused", "ended"], reason: str = "") -> None:
        """Tells everyone the state of the run, now and after every reconnection."""
        self._status = (status, reason)
        self._post.announce(status, reason)

    def until(self, done: Callable[[], bool]) -> None:
        """Handles events until `done`.

        Raises:
            StopRequested: somebody asked the run to stop.
            KeyboardInterrupt: or interrupted it.
            RunError: the run directory cannot be written.
        """
        while True:
            now = self._clock()
            try:
                self._check()
            except (StopRequested, KeyboardInterrupt):
                self._end_sync()
                raise
            self._blobs.tick(now)
            self._uploads.ask_for_stalled()
            if done():
                self._end_sync()
                return
            if not self._ahead:
                self._end_sync()
                self._take_ahead(self._patience(now))
            handled = 0
            while self._ahead and handled < BATCH_EVENTS:
                handled += self._handle_next()
            # The disk has had the time that this batch took for what was begun after the one before.
            self._end_sync()
            self._begin_sync()

    def _handle_next(self) -> int:
        """Handles the events that were looked at; how many."""
        events, look = self._ahead.popleft()
        self._take_ahead(0)
        self._signatures.rely_on(look)
        for event in events:
            self._handle(event)
        self._uploads.sign_verdicts()
        return len(events)

    def _begin_sync(self) -> None:
        """Begins to write down what was handled: two files at the same time."""
        self._uploads.begin_sync()
        self._clients.save_new()
        self._chronicle.begin_commit()

    def _end_sync(self) -> None:
        """Waits for the disk, and tells those whose updates it has."""
        self._chronicle.end_commit()
        self._uploads.send_verdicts()

    def _take_ahead(self, timeout: float) -> None:
        """Takes what is in the queue, or comes into it in time, and begins to check the signatures."""
        while len(self._ahead) < AHEAD_TIMES:
            events: list[Event] = []
            event = self._transport.receive(timeout)
            while event is not None:
                events.append(event)
                event = self._transport.receive(0) if len(events) < AHEAD_EVENTS else None
            if events:
                self._ahead.append((events, self._signatures.look_ahead(events)))
            if len(events) < AHEAD_EVENTS:
                return
            timeout = 0

    def _handle(self, event: Event) -> None:
        match event:
            case Received():
                self._intake.handle(event)
            case Noticed():
                if self._uploads.foreman:
                    self._uploads.foreman.hear(event.notice)
            case Disconnected():
                logger.warning("lost the broker: %s; reconnecting", event.reason)
            case Connected():
                self._post.announce(*self._status)
                self._chronicle.tell()

    def _patience(self, now: float) -> float:
        """Seconds until something is due by itself."""
        due = [now + POLL_SECONDS]
        if (blob := self._blobs.next_due()) is not None:
            due.append(blob)
        if (current := self._agenda.current) and current.state.deadline_at > now:
            due.append(current.state.deadline_at)
        return max(0.001, min(due) - now)

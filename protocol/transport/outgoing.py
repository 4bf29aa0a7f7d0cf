"""What is to be sent: control messages first, then pieces of blobs, cut at the last moment.

Blobs stand here as wanted ranges, not as bytes: asking for the same bytes again while they wait or are on the way
changes nothing, and memory does not grow with what is queued. Whoever owns the network takes out one message at a
time, says what the broker has acknowledged, and says when the connection was lost: what was on the way then goes
again. No locks, no clock of its own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from edgetrain.protocol.blobs import DEFAULT_CHUNK_BYTES, HEADER_BYTES, Blob, make_chunk
from edgetrain.protocol.ranges import RangeSet
from edgetrain.protocol.transport.pacing import RateMeter, TokenBucket

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Control:
    """A message as it was published."""

    topic: str
    payload: bytes
    retain: bool = False
    # Not to be sent after a reconnect.
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a blob, on its way to a topic."""

    topic: str
    payload: bytes
    sending: _Sending
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class _Sending:
    topic: str
    blob: Blob
    chunk_bytes: int
    todo: RangeSet = field(default_factory=RangeSet)
    on_the_way: RangeSet = field(default_factory=RangeSet)
    forgotten: bool = False
    resend: bool = True


class Outgoing:
    """The queue of one connection.

    Args:
        rate: cap for blobs, bytes per second; 0 for none.
    """

    def __init__(self, *, rate: float = 0.0) -> None:
        # Largest payload of any message that the broker takes, and of a chunk.
        self.max_message = 0
        self.max_payload = DEFAULT_CHUNK_BYTES + HEADER_BYTES
        # Messages that may be unacknowledged.
        self.max_messages = 1
        self.meter = RateMeter()
        self._bucket = TokenBucket(rate)
        self._control: deque[Control] = deque()
        # By (topic, digest): all that have something to do or on the way, and the turns of the former.
        self._blobs: dict[tuple[str, bytes], _Sending] = {}
        self._turns: deque[_Sending] = deque()
        # By packet id, in the order of sending: (what, when).
        self._sent: dict[int, tuple[Control | Piece, float]] = {}
        self._bulk_sent = 0
        self._last_acknowledged = 0.0

    @property
    def empty(self) -> bool:
        """Nothing waits and nothing is on the way."""
        return not (self._control or self._turns or self._sent)

    @property
    def oldest(self) -> float | None:
        """When the oldest message that nobody has acknowledged was sent."""
        return next((at for _, at in self._sent.values()), None)

    def put(self, message: Control) -> None:
        """Queues a message."""
        self._control.append(message)

    def put_blob(
        self,
        topic: str,
        blob: Blob,
        ranges: Iterable[tuple[int, int]],
        chunk_bytes: int,
        *,
        resend: bool = True,
    ) -> None:
        """Queues parts of a blob, but for those that wait already or are on the way to that topic.

        Args:
            topic: where to.
            blob: whole.
            ranges: half-open byte ranges; none for all.
            chunk_bytes: most payload bytes in one chunk; 0 for as many as suit the link.
            resend: whether it survives a lost connection.
        """
        size = blob.ref.size
        wanted = RangeSet((start, min(stop, size)) for start, stop in (tuple(ranges) or ((0, size),)))
        key = (topic, blob.ref.digest)
        sending = self._blobs.get(key)
        if sending is None:
            sending = self._blobs[key] = _Sending(topic, blob, chunk_bytes)
        sending.blob, sending.chunk_bytes, sending.resend = blob, chunk_bytes, resend
        waits = bool(sending.todo)
        for start, stop in wanted.without(sending.on_the_way):
            sending.todo.add(start, stop)
        if sending.todo and not waits:
            self._turns.append(sending)
        self._drop_if_done(sending)

    def forget_blob(self, digest: bytes) -> None:
        """Nobody wants this blob any more."""
        for key in [key for key in self._blobs if key[1] == digest]:
            self._blobs.pop(key).forgotten = True
        self._turns = deque(sending for sending in self._turns if not sending.forgotten)

    def next(self, now: float) -> Control | Piece | None:
        """What goes now, if anything may."""
        if len(self._sent) >= self.max_messages:
            return None
        while self._control:
            message = self._control.popleft()
            if not self.max_message or len(message.payload) <= self.max_message:
                return message
            # It would close the connection, and be sent again after the next one was made.
            logger.error(
                "a message of %d bytes to %s is dropped: the broker takes %d; raise its packet limit",
                len(message.payload), message.topic, self.max_message,
            )  # fmt: skip
        if not self._turns or self._bulk_sent >= self.meter.window_bytes() or self._bucket.wait(now) > 0:
            return None
        # One piece of each in turn.
        sending = self._turns.popleft()
        piece = self._cut(sending)
        if sending.todo:
            self._turns.append(sending)
        self._bucket.take(len(piece.payload))
        return piece

    def wait(self, now: float) -> float | None:
        """Seconds until the cap lets something go; None if it is not what `next` waits for."""
        if not self._turns or len(self._sent) >= self.max_messages or self._bulk_sent >= self.meter.window_bytes():
            return None
        return self._bucket.wait(now)

    def sent(self, packet: int, what: Control | Piece, now: float) -> None:
        """`what` was handed to the network."""
        self._sent[packet] = (what, now)
        if isinstance(what, Piece):
            self._bulk_sent += len(what.payload)
            what.sending.on_the_way.add(what.start, what.stop)

    def acknowledged(self, packet: int, now: float) -> None:
        """The broker has it. An unknown packet id changes nothing."""
        what, at = self._sent.pop(packet, (None, 0.0))
        if isinstance(what, Piece):
            self._bulk_sent -= len(what.payload)
            what.sending.on_the_way.remove(what.start, what.stop)
            self._drop_if_done(what.sending)
            self.meter.add(len(what.payload), now - max(at, self._last_acknowledged))
        self._last_acknowledged = now

    def connection_lost(self) -> None:
        """What was on the way goes again, first of all; but for blobs whose receiver will ask for the rest."""
        for sending in [sending for sending in self._blobs.values() if not sending.resend]:
            self._blobs.pop((sending.topic, sending.blob.ref.digest)).forgotten = True
        self._turns = deque(sending for sending in self._turns if not sending.forgotten)
        lost = [what for what, _ in self._sent.values()]
        self._sent.clear()
        self._bulk_sent = 0
        messages = [*(what for what in lost if isinstance(what, Control)), *self._control]
        self._control = deque(message for message in messages if not message.transient)
        pieces = [what for what in lost if isinstance(what, Piece) and not what.sending.forgotten]
        for piece in pieces:
            piece.sending.on_the_way = RangeSet()
        for piece in pieces:
            self.put_blob(piece.topic, piece.sending.blob, [(piece.start, piece.stop)], piece.sending.chunk_bytes)

    def _drop_if_done(self, sending: _Sending) -> None:
        if not (sending.todo or sending.on_the_way or sending.forgotten):
            self._blobs.pop((sending.topic, sending.blob.ref.digest), None)

    def _cut(self, sending: _Sending) -> Piece:
        start, stop = next(iter(sending.todo))
        most = max(1, min(DEFAULT_CHUNK_BYTES, self.max_payload - HEADER_BYTES))
        most = max(1, min(most, sending.chunk_bytes)) if sending.chunk_bytes else self.meter.chunk_bytes(most)
        most = self._bucket.within(most)
        stop = min(stop, start + most)
        payload = make_chunk(sending.blob.ref, start, sending.blob.read(start, stop))
        sending.todo.remove(start, stop)
        return Piece(sending.topic, payload, sending, start, stop)

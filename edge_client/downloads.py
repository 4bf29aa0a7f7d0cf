"""Getting blobs: ask for what suits the link, gather chunks, ask again for what is missing.

A fast link asks for a whole blob, so that the broker's fan-out serves all who want it at the same time. Any other
asks for a window of a few seconds at a time, in chunks of a fraction of a second: then a cut takes little with it,
and nothing is sent twice that has already arrived.
"""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.protocol.blobs import Assembler, Chunk
from edgetrain.protocol.messages import Want
from edgetrain.protocol.partial import PartialBlob
from edgetrain.protocol.ranges import RangeSet
from edgetrain.protocol.transport.pacing import RateMeter, TokenBucket

# Silence for so long means that something was lost.
STALL_SECONDS = 2.0
# The silence doubles between requests that nobody answers, up to this.
MAX_STALL_SECONDS = 60.0
# Ranges asked for at once; the rest comes with the next request.
MAX_RANGES = 512
# A blob that takes no longer than this, as far as we know the link, is asked for whole. Not longer: it may come as a
# single chunk, all of which a cut would lose.
WHOLE_SECONDS = 0.5
WINDOW_SECONDS = 2.0
MAX_WINDOW_BYTES = 1 << 20


class Download:
    """One blob on its way in. Driven by its owner: no thread, no clock of its own.

    Args:
        blob: takes the chunks; may have some already.
        ask: sends a `Want`.
        link: what is known of the link; learns more.
        cap: of what is asked for.
        now: monotonic seconds.
    """

    def __init__(
        self,
        blob: Assembler | PartialBlob,
        *,
        ask: Callable[[Want], None],
        link: RateMeter,
        cap: TokenBucket,
        now: float,
    ) -> None:
        self._blob = blob
        self._ask = ask
        self._link = link
        self._cap = cap
        self._stalls = 0
        # Asked for and not yet here.
        self._expected = RangeSet()
        self._moved_at = now
        # When the chunk before came, if more was expected then.
        self._chunk_at: float | None = None
        if not blob.complete:
            self._request(now)

    @property
    def complete(self) -> bool:
        """Nothing is missing."""
        return self._blob.complete

    def add(self, chunk: Chunk, now: float) -> None:
        """Takes a chunk; one of another blob is ignored."""
        if chunk.digest != self._blob.ref.digest:
            return
        self._blob.add(chunk)
        if self._chunk_at is not None:
            self._link.add(len(chunk.data), now - self._chunk_at)
        self._expected.remove(chunk.offset, chunk.offset + len(chunk.data))
        self._chunk_at = now if self._expected else None
        self._moved_at, self._stalls = now, 0
        if self._expected.size < self._window() // 2:
            self._request(now)

    def tick(self, now: float) -> None:
        """Asks again after a silence, and for more when the cap allows."""
        if now - self._moved_at >= self._stall_seconds():
            self._stalls = min(self._stalls + 1, 10)
            self.repeat(now)
        elif self._expected.size < self._window() // 2:
            self._request(now)

    def patience(self, now: float) -> float:
        """Seconds until `tick` has something to do."""
        waiting = self._stall_seconds() - (now - self._moved_at)
        if self._cap.rate and self._expected.size < self._window() // 2:
            waiting = min(waiting, self._cap.wait(now))
        return max(waiting, 0.0)

    def repeat(self, now: float) -> None:
        """Asks for what is missing, e.g. after a reconnect: what was asked for before will not come."""
        self._moved_at, self._chunk_at = now, None
        self._expected = RangeSet()
        self._request(now)

    def _stall_seconds(self) -> float:
        expected = 3 * self._link.chunk_bytes() / self._link.rate if self._link.rate else 0.0
        return min(max(STALL_SECONDS, expected) * 2.0**self._stalls, MAX_STALL_SECONDS)

    def _window(self) -> int:
        return self._cap.within(self._link.window_bytes(WINDOW_SECONDS, MAX_WINDOW_BYTES), WINDOW_SECONDS)

    def _request(self, now: float) -> None:
        size, missing = self._blob.ref.size, RangeSet(self._blob.missing())
        wanted = missing.without(self._expected)
        if not wanted or self._cap.wait(now) > 0:
            return
        if missing == wanted and missing.size == size and self._is_quick(size):
            self._ask(Want(digest=self._blob.ref.digest))
        else:
            # As many bytes as fit, in as many ranges as fit.
            room = self._window() - self._expected.size
            wanted = RangeSet(list(wanted.first(room))[:MAX_RANGES])
            if not wanted:
                return
            chunk_bytes = self._cap.within(self._link.chunk_bytes())
            self._ask(Want(digest=self._blob.ref.digest, ranges=tuple(wanted), chunk_bytes=chunk_bytes))
        for start, stop in wanted:
            self._expected.add(start, stop)
        self._cap.take(wanted.size)

    def _is_quick(self, size: int) -> bool:
        if self._cap.rate:
            return False
        rate = self._link.rate
        return size <= self._window() if rate is None else size <= rate * WHOLE_SECONDS

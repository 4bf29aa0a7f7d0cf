"""Getting blobs: ask, gather chunks, ask again for what is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edgetrain.protocol.blobs import Assembler, Chunk
from edgetrain.protocol.messages import BlobRef, Want

logger = logging.getLogger(__name__)

# Silence for so long means that something was lost.
STALL_SECONDS = 2.0
# The silence doubles between requests that nobody answers, up to this.
MAX_STALL_SECONDS = 60.0
# Ranges asked for at once; the rest comes with the next request.
MAX_RANGES = 512


class Download:
    """One blob on its way in. Driven by its owner: no thread, no clock of its own.

    Args:
        ref: what is wanted.
        limit: most bytes allowed.
        ask: sends a `Want`.
        now: monotonic seconds.
    """

    def __init__(self, ref: BlobRef, *, limit: int, ask: Callable[[Want], None], now: float) -> None:
        self._assembler = Assembler(ref, limit=limit)
        self.ref = ref
        self._ask = ask
        self._moved_at = now
        self._stalls = 0
        self._ask(Want(digest=ref.digest))

    @property
    def complete(self) -> bool:
        """Nothing is missing."""
        return not self._assembler.missing()

    def add(self, chunk: Chunk, now: float) -> None:
        """Takes a chunk; one of another blob is ignored."""
        if chunk.digest == self.ref.digest:
            self._assembler.add(chunk)
            self._moved_at, self._stalls = now, 0

    def tick(self, now: float) -> None:
        """Asks again after a silence."""
        if now - self._moved_at < min(STALL_SECONDS * 2.0**self._stalls, MAX_STALL_SECONDS):
            return
        self._stalls = min(self._stalls + 1, 10)
        self.repeat(now)

    def repeat(self, now: float) -> None:
        """Asks for what is missing, e.g. after a reconnect."""
        self._moved_at = now
        missing = self._assembler.missing()
        everything = missing == [(0, self.ref.size)]
        self._ask(Want(digest=self.ref.digest, ranges=() if everything else tuple(missing[:MAX_RANGES])))

    def finish(self) -> bytes:
        """The verified blob."""
        return self._assembler.finish()

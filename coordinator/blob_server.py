"""Gives out blobs: to all who asked at about the same time at once, by the broker's fan-out; repairs to one."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgetrain.protocol.blobs import DEFAULT_CHUNK_BYTES, MIN_CHUNK_BYTES, Blob
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.names import Topics
from edgetrain.protocol.transport import Transport

# How long a first request waits for others, so that one publication serves them all.
GATHER_SECONDS = 0.05


@dataclass(slots=True)
class _Served:
    blob: Blob
    # Number of clients expected to ask; 0 if unknown.
    audience: int = 0
    waiting: set[str] = field(default_factory=set)
    due: float = 0.0


class BlobServer:
    """Serves blobs by digest.

    Args:
        topics: of the federation.
        transport: connected; it cuts the chunks when they can leave, so that what is queued takes no memory.
        chunk_bytes: most payload bytes in one chunk.
    """

    def __init__(self, topics: Topics, transport: Transport, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        self._topics = topics
        self._transport = transport
        self._chunk_bytes = chunk_bytes
        self._served: dict[bytes, _Served] = {}

    def add(self, data: bytes | memoryview, ref: BlobRef | None = None) -> BlobRef:
        """Makes a blob available; arguments as of `Blob`."""
        blob = Blob(data, ref)
        self._served.setdefault(blob.ref.digest, _Served(blob))
        return blob.ref

    def expect(self, ref: BlobRef, *, audience: int) -> None:
        """Says how many clients will ask for a blob: when so many have, it goes out without further wait."""
        self._served[ref.digest].audience = audience

    def remove(self, ref: BlobRef) -> None:
        """Forgets a blob, and what of it has not left yet."""
        self._served.pop(ref.digest, None)
        self._transport.forget_blob(ref.digest)

    def want(
        self, client: str, digest: bytes, ranges: tuple[tuple[int, int], ...], now: float, chunk_bytes: int = 0
    ) -> bool:
        """A client asks; False if there is no such blob."""
        served = self._served.get(digest)
        if served is None:
            return False
        if ranges:
            self._send(served, self._topics.to_client(client, "blob"), ranges, chunk_bytes)
            return True
        if not served.waiting:
            served.due = now + GATHER_SECONDS
        served.waiting.add(client)
        if len(served.waiting) >= served.audience > 0:
            served.due = now
        self.tick(now)
        return True

    def tick(self, now: float) -> None:
        """Publishes what is due."""
        for served in self._served.values():
            if served.waiting and now >= served.due:
                if len(served.waiting) == 1:
                    topic = self._topics.to_client(next(iter(served.waiting)), "blob")
                else:
                    topic = self._topics.broadcast_blob(served.blob.ref.digest)
                served.waiting.clear()
                self._send(served, topic, ())

    def next_due(self) -> float | None:
        """When `tick` has something to do, if ever."""
        return min((served.due for served in self._served.values() if served.waiting), default=None)

    def _send(self, served: _Served, topic: str, ranges: tuple[tuple[int, int], ...], chunk_bytes: int = 0) -> None:
        wanted = min(chunk_bytes or self._chunk_bytes, self._chunk_bytes)
        self._transport.send_blob(topic, served.blob, ranges, chunk_bytes=max(wanted, MIN_CHUNK_BYTES))

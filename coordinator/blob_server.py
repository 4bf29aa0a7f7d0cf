"""Gives out blobs: to all who asked at about the same time at once, by the broker's fan-out; repairs to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgetrain.protocol.blobs import DEFAULT_CHUNK_BYTES, blob_ref, cut
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.names import Topics

# How long a first request waits for others, so that one publication serves them all.
GATHER_SECONDS = 0.05


@dataclass(slots=True)
class _Blob:
    ref: BlobRef
    data: bytes
    # Number of clients expected to ask; 0 if unknown.
    audience: int = 0
    waiting: set[str] = field(default_factory=set)
    due: float = 0.0


class BlobServer:
    """Serves blobs by digest.

    Args:
        topics: of the federation.
        publish: (topic, payload) -> None.
        chunk_bytes: most payload bytes in one chunk.
    """

    def __init__(
        self, topics: Topics, publish: Callable[[str, bytes], None], chunk_bytes: int = DEFAULT_CHUNK_BYTES
    ) -> None:
        self._topics = topics
        self._publish = publish
        self._chunk_bytes = chunk_bytes
        self._blobs: dict[bytes, _Blob] = {}

    def add(self, data: bytes) -> BlobRef:
        """Makes a blob available."""
        ref = blob_ref(data)
        self._blobs.setdefault(ref.digest, _Blob(ref, data))
        return ref

    def expect(self, ref: BlobRef, *, audience: int) -> None:
        """Says how many clients will ask for a blob: when so many have, it goes out without further wait."""
        self._blobs[ref.digest].audience = audience

    def remove(self, ref: BlobRef) -> None:
        """Forgets a blob."""
        self._blobs.pop(ref.digest, None)

    def want(self, client: str, digest: bytes, ranges: tuple[tuple[int, int], ...], now: float) -> bool:
        """A client asks; False if there is no such blob."""
        blob = self._blobs.get(digest)
        if blob is None:
            return False
        if ranges:
            self._send(blob, self._topics.to_client(client, "blob"), _merge(ranges))
            return True
        if not blob.waiting:
            blob.due = now + GATHER_SECONDS
        blob.waiting.add(client)
        if len(blob.waiting) >= blob.audience > 0:
            blob.due = now
        self.tick(now)
        return True

    def tick(self, now: float) -> None:
        """Publishes what is due."""
        for blob in self._blobs.values():
            if blob.waiting and now >= blob.due:
                if len(blob.waiting) == 1:
                    topic = self._topics.to_client(next(iter(blob.waiting)), "blob")
                else:
                    topic = self._topics.broadcast_blob(blob.ref.digest)
                blob.waiting.clear()
                self._send(blob, topic, ())

    def next_due(self) -> float | None:
        """When `tick` has something to do, if ever."""
        return min((blob.due for blob in self._blobs.values() if blob.waiting), default=None)

    def _send(self, blob: _Blob, topic: str, ranges: tuple[tuple[int, int], ...]) -> None:
        for chunk in cut(blob.ref, blob.data, ranges, self._chunk_bytes):
            self._publish(topic, chunk)


def _merge(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same bytes, each once: a request is never answered with more than the blob."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)

"""Where the bytes of an outgoing blob are: in memory, or in a file that is mapped there."""

from __future__ import annotations

from typing import Protocol

from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.messages import BlobRef


class BlobReader(Protocol):
    """Gives out parts of one blob. Called from the network thread."""

    @property
    def ref(self) -> BlobRef:
        """Digest and size."""
        ...

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes [start, stop) of the blob."""
        ...


class MemoryBlob:
    """A blob in memory; of a mapped file only what is being sent.

    Args:
        data: the whole of it.
        ref: if it is known already.
    """

    def __init__(self, data: bytes | memoryview, ref: BlobRef | None = None) -> None:
        self.ref = ref or blob_ref(data)
        self._data = memoryview(data)

    def read(self, start: int, stop: int) -> memoryview:
        """See `BlobReader`."""
        return self._data[start:stop]

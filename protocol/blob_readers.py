"""Where the bytes of an outgoing blob are: in memory, or in a file that is read piece by piece."""

from __future__ import annotations

from pathlib import Path
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
        """Bytes [start, stop) of the blob.

        Raises:
            OSError: they cannot be read (any more).
        """
        ...


class MemoryBlob:
    """A blob in memory.

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


class FileBlob:
    """A blob in a file, which is opened for every piece: nothing is kept in memory, and the file may be deleted.

    Args:
        ref: digest and size; trusted, since the receiver checks them.
        path: the file.
    """

    def __init__(self, ref: BlobRef, path: Path) -> None:
        self.ref = ref
        self._path = path

    def read(self, start: int, stop: int) -> bytes:
        """See `BlobReader`."""
        with self._path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise OSError(f"{self._path} is shorter than it was")
        return data

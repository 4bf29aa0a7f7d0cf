"""What workers have stored of an upload: the coordinator only asks for the rest of it."""

from __future__ import annotations

from pathlib import Path

from edgetrain.protocol.blobs import check_size
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.partial import PartialBlob, has_pieces


class RemotePieces:
    """A blob that others put together. One that comes in one piece leaves no trace here.

    Args:
        ref: what was announced.
        directory: where its pieces go; what is there from an earlier process counts.
        limit: largest size allowed, in bytes.

    Raises:
        BlobError: the announced size exceeds the limit.
        OSError: the directory cannot be used.
    """

    def __init__(self, ref: BlobRef, directory: Path, *, limit: int) -> None:
        check_size(ref, limit)
        self.ref = ref
        self.directory = directory
        self._limit = limit
        self._spooled = PartialBlob(ref, directory, limit=limit) if has_pieces(directory, ref.digest) else None

    @property
    def complete(self) -> bool:
        """All of it is in the directory."""
        return self._spooled is not None and self._spooled.complete

    def prepare(self) -> None:
        """Makes the directory ready for pieces.

        Raises:
            OSError: it cannot be used.
        """
        if self._spooled is None:
            self._spooled = PartialBlob(self.ref, self.directory, limit=self._limit)

    def note(self, start: int, stop: int) -> None:
        """A worker has stored a piece."""
        assert self._spooled is not None, "prepared before any worker was told to"
        self._spooled.note(start, stop)

    @property
    def begun(self) -> bool:
        """Some of it is in the directory."""
        return self._spooled is not None and self._spooled.begun

    def missing(self) -> list[tuple[int, int]]:
        """Half-open byte ranges that are not in the directory, ascending."""
        return self._spooled.missing() if self._spooled else [(0, self.ref.size)]

    def discard(self) -> None:
        """Forgets everything."""
        if self._spooled:
            self._spooled.discard()

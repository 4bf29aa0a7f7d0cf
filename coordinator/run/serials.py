"""Serial numbers that grow also when the clock goes backwards or the process dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from edgetrain.coordinator.errors import RunError
from edgetrain.protocol.files import write_atomically

# So many are set aside on disk at once, in milliseconds of the clock; what a crash leaves unused is skipped.
RESERVED = 60_000


class Serials:
    """Milliseconds since 1970 where the clock allows it, else one more than the last.

    Args:
        path: file with the number below which all may have been used.
        clock: wall time in seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        try:
            text = path.read_text(encoding="ascii").strip() if path.exists() else "0"
            self._last = self._reserved = int(text)
            if not 0 <= self._last < 2**53:
                raise ValueError("out of range")
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: is not a serial number: {error}; remove it") from error

    def __call__(self) -> int:
        """The next one.

        Raises:
            RunError: it cannot be kept.
        """
        self._last = max(self._last + 1, int(self._clock() * 1000))
        if self._last >= self._reserved:
            self._reserved = self._last + RESERVED
            try:
                write_atomically(self._path, f"{self._reserved}\n".encode())
            except OSError as error:
                raise RunError(f"{self._path}: {error}") from error
        return self._last

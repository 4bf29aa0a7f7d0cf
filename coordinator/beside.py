"""Work beside the coordinator's thread: waiting for the disk, or computing on arrays, while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """A call in a thread of its own, which nobody else's state may depend on until it has ended.

    Args:
        call: what to do.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: T | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Returns when it has ended, in whatever way."""
        self._thread.join()

    def result(self) -> T:
        """What it returned, or raises what it raised."""
        self.join()
        if self._failure:
            raise self._failure
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._failure = error

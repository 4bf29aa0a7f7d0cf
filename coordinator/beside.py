"""Work beside the coordinator's thread: waiting for the disk, or computing on arrays, while something else goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")

# Threads that stay: to start one takes longer than many a sync. More calls at the same time than there ever are.
_threads = ThreadPoolExecutor(16, thread_name_prefix="beside")


class Beside(Generic[T]):
    """A call in another thread, which nobody else's state may depend on until it has ended.

    Args:
        call: what to do.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._future = _threads.submit(call)

    def join(self) -> None:
        """Returns when it has ended, in whatever way."""
        wait([self._future])

    def result(self) -> T:
        """What it returned, or raises what it raised."""
        return self._future.result()

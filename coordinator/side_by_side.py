"""Calls that let go of the interpreter (signatures, most of all), several at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# More do not help: what is between two calls is done by one thread at a time.
MAX_THREADS = 4
# Fewer calls are not worth waking somebody.
_LEAST_EACH = 4


class SideBySide:
    """A few threads that help the one that asks.

    Args:
        threads: how many work together, with the one that asks; by default one for each processor, up to a maximum.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = min(MAX_THREADS, os.cpu_count() or 1) if threads is None else threads
        self._helpers: ThreadPoolExecutor | None = None

    def map(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`call` of every item, in the items' order.

        Args:
            call: must not depend on its other calls, nor on what the asking thread does meanwhile: that waits here.
            items: for it.

        Raises:
            Exception: what a call has raised.
        """
        helpers = min(self._threads, len(items) // _LEAST_EACH) - 1
        if helpers < 1:
            return [call(item) for item in items]
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="side-by-side")
        results: dict[int, R] = {}
        # Shared: who is done with one takes the next, however busy the processors of the others are.
        numbers = iter(range(len(items)))

        def work() -> None:
            for number in numbers:
                results[number] = call(items[number])

        tasks = [self._helpers.submit(work) for _ in range(helpers)]
        try:
            work()
        finally:
            # One that has not begun finds nothing to do.
            begun = [task for task in tasks if not task.cancel()]
            failures = [failure for task in begun if (failure := task.exception())]
        if failures:
            raise failures[0]
        return [results[number] for number in range(len(items))]

    def close(self) -> None:
        """Ends the threads. Idempotent."""
        if self._helpers:
            self._helpers.shutdown()
            self._helpers = None

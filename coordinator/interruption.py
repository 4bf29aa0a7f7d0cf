"""Ctrl-C and SIGTERM while a coordinator runs: heard between two events, where nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within it the first signal waits for `check`; another one is a KeyboardInterrupt at once.

    Python raises KeyboardInterrupt between any two instructions, such as a write and the note that it was made. What
    is ignored stays so. In another thread than the first, which gets no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if callable(signal.getsignal(number))]
            self._before = {number: signal.signal(number, self._hear) for number in heard}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if kind is None:
            self.check()

    def check(self) -> None:
        """Where the run can be left.

        Raises:
            KeyboardInterrupt: it was asked for.
        """
        if self._asked:
            raise KeyboardInterrupt

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.check()
        self._asked = True

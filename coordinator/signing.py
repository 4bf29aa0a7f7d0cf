"""Signatures made and checked while the coordinator does something else.

It checks a signature and makes one for every update, which is a third of its work. Once there is much of it, a process
beside it does that. Threads help less: between two signatures each needs the interpreter, which the coordinator's own
thread then has to wait for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from edgetrain.coordinator import signing_process
from edgetrain.coordinator.processes import stop
from edgetrain.coordinator.signing_process import READY, Check, Identity, Seal, Signer, frame, read_frame, write_frame
from edgetrain.protocol.signing import SigningKey

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# So many signatures at a time are worth starting a process, and so many asking it.
MANY, SOME = 32, 4
# With so many requests before it, the process is behind the one that it helps.
BEHIND = 2
# It answers within milliseconds.
_PATIENCE_SECONDS = 30.0


class Signing:
    """Signs in the name of one, and checks what others have signed. Used by one thread.

    Args:
        federation: whose messages they are.
        sender: who signs.
        key: the sender's.
        beside: whether a process may help; by default where there is a second processor.
    """

    def __init__(self, federation: str, sender: str, key: SigningKey, *, beside: bool | None = None) -> None:
        self._identity = Identity(federation, sender, bytes.fromhex(key.secret()))
        self._signer = Signer(self._identity)
        self._may_help = (os.cpu_count() or 1) > 1 if beside is None else beside
        self._helper: _Helper | None = None

    def check(self, jobs: Sequence[tuple[bytes, bytes]]) -> Callable[[], list[bool]]:
        """Begins to check signatures.

        Args:
            jobs: public keys, and the envelopes that their owners should have signed.

        Returns:
            What waits for the answers: whether they have.
        """
        return self._begin(Check(jobs), len(jobs), list[bool], lambda: self._signer.check(jobs))

    def seal(self, bodies: Sequence[bytes]) -> Callable[[], list[bytes]]:
        """Begins to sign; returns what waits for the envelopes of these bodies."""
        # Who is behind is not given more.
        behind = self._helper is not None and (self._unless_gone(self._helper.unanswered) or 0) >= BEHIND
        return self._begin(Seal(bodies), 0 if behind else len(bodies), list[bytes], lambda: self._signer.seal(bodies))

    @property
    def helper_pid(self) -> int | None:
        """Id of the process that helps; None without one."""
        return self._helper.pid if self._helper else None

    def close(self) -> None:
        """Ends the process; nothing is begun any more. Idempotent."""
        self._may_help = False
        if self._helper:
            self._helper.close()
            self._helper = None

    def _begin(
        self, request: Check | Seal, count: int, kind: type[list[T]], here: Callable[[], list[T]]
    ) -> Callable[[], list[T]]:
        if self._may_help and self._helper is None and count >= MANY:
            self._helper = self._unless_gone(lambda: _Helper(self._identity))
        helper = self._helper
        ticket = self._unless_gone(lambda: helper.ask(request)) if helper and count >= SOME else None
        if helper is None or ticket is None:
            answer = here()
            return lambda: answer

        def wait() -> list[T]:
            # It may have gone since.
            answer = self._unless_gone(lambda: helper.answer(ticket, kind)) if helper is self._helper else None
            return here() if answer is None else answer

        return wait

    def _unless_gone(self, call: Callable[[], R]) -> R | None:
        try:
            return call()
        except (OSError, EOFError, msgspec.DecodeError) as error:
            logger.warning("the process that helps with signatures is gone (%r); going on without it", error)
            self.close()
            return None


class _Helper:
    """The process, from here. Its errors are OSError, EOFError and msgspec's."""

    def __init__(self, identity: Identity) -> None:
        # It ends with its input, so with us; Ctrl-C is for us alone.
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", signing_process.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin, "asked for"
        assert self._process.stdout, "asked for"
        self._requests, self._answers = self._process.stdin, self._process.stdout
        write_frame(self._requests, msgspec.msgpack.encode(identity))
        os.set_blocking(self._requests.fileno(), False)
        self._is_ready = False
        self._asked = self._answered = 0
        # Those that were read before anybody wanted them.
        self._early: dict[int, bytes] = {}

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def ask(self, request: Check | Seal) -> int | None:
        """Sends a request; a ticket for its answer, or None while the process starts."""
        if not self._is_ready:
            if not self._has_answer(0.0):
                return None
            self._is_ready = read_frame(self._answers) == READY
        self._write(frame(msgspec.msgpack.encode(request)))
        self._asked += 1
        return self._asked

    def unanswered(self) -> int:
        """How many requests it still has before it."""
        while self._answered < self._asked and self._has_answer(0.0):
            self._read()
        return self._asked - self._answered

    def answer(self, ticket: int, kind: type[T]) -> T:
        """Waits for an answer."""
        while self._answered < ticket:
            if not self._has_answer(_PATIENCE_SECONDS):
                raise TimeoutError(f"no answer in {_PATIENCE_SECONDS:.0f} s")
            self._read()
        return msgspec.msgpack.decode(self._early.pop(ticket), type=kind)

    def _write(self, request: bytes) -> None:
        """Writes it. What it still has to say is read meanwhile: neither waits for the other for ever."""
        rest = memoryview(request)
        while rest:
            written = self._requests.write(rest)
            if written:
                rest = rest[written:]
                continue
            poller = select.poll()
            poller.register(self._requests.fileno(), select.POLLOUT)
            poller.register(self._answers.fileno(), select.POLLIN)
            ready = dict(poller.poll(1000 * _PATIENCE_SECONDS))
            if not ready:
                raise TimeoutError(f"it has read nothing for {_PATIENCE_SECONDS:.0f} s")
            if self._answers.fileno() in ready:
                self._read()

    def _read(self) -> None:
        """Reads the next answer."""
        answer = read_frame(self._answers)
        self._answered += 1
        self._early[self._answered] = answer

    def close(self) -> None:
        """Ends it."""
        for file in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                file.close()
        stop(self._process)

    def _has_answer(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._answers.fileno(), select.POLLIN)
        return bool(poller.poll(1000 * seconds))

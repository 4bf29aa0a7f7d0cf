"""Being a systemd service: ready, alive, stopping (sd_notify(3)), without its library."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Literal

from edgetrain.protocol.blobs import Blob
from edgetrain.protocol.transport import Event, Transport


class Service:
    """Talks to the service manager, if one has started this process.

    Args:
        environment: NOTIFY_SOCKET and WATCHDOG_USEC, as the service manager sets them.
        clock: monotonic seconds.
    """

    def __init__(
        self, environment: Mapping[str, str] = os.environ, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        microseconds = environment.get("WATCHDOG_USEC", "")
        # A third of what it waits: one sign of life may be lost.
        self._every = int(microseconds) / 3e6 if microseconds.isdigit() else 0.0
        self._clock = clock
        self._last: float | None = None

    def ready(self) -> None:
        """The process works."""
        self.say("READY=1")

    def stopping(self) -> None:
        """It ends by itself."""
        self.say("STOPPING=1")

    def alive(self) -> None:
        """A sign of life, if one is due."""
        if not self._every:
            return
        now = self._clock()
        if self._last is None or now - self._last >= self._every:
            self._last = now
            self.say("WATCHDOG=1")

    def sleep(self, seconds: float) -> None:
        """Sleeps, and gives signs of life."""
        end = self._clock() + seconds
        while (left := end - self._clock()) > 0:
            self.alive()
            time.sleep(min(left, self._every or left))

    def say(self, state: str) -> None:
        """Sends a line; a service manager that is not there does not matter."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                # One that does not read must not stop us.
                channel.setblocking(False)
                channel.connect(self._address)
                channel.sendall(state.encode())
        except OSError:
            return


class LivingTransport:
    """A transport whose every wait is a sign of life: a client that hangs stops waiting.

    Args:
        inner: the real one.
        service: hears of it.
    """

    def __init__(self, inner: Transport, service: Service) -> None:
        self._inner = inner
        self._service = service

    @property
    def bytes_sent(self) -> int:
        """See `Transport`."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `Transport`."""
        return self._inner.bytes_received

    def subscribe(self, topic: str, *, qos: Literal[0, 1] = 1) -> None:
        """See `Transport`."""
        self._inner.subscribe(topic, qos=qos)

    def unsubscribe(self, topic: str) -> None:
        """See `Transport`."""
        self._inner.unsubscribe(topic)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, transient: bool = False) -> None:
        """See `Transport`."""
        self._inner.publish(topic, payload, retain=retain, transient=transient)

    def together(self) -> AbstractContextManager[None]:
        """See `Transport`."""
        return self._inner.together()

    def send_blob(
        self,
        topic: str,
        blob: Blob,
        ranges: Iterable[tuple[int, int]] = (),
        *,
        chunk_bytes: int = 0,
        resend: bool = True,
    ) -> None:
        """See `Transport`."""
        self._inner.send_blob(topic, blob, ranges, chunk_bytes=chunk_bytes, resend=resend)

    def forget_blob(self, digest: bytes) -> None:
        """See `Transport`."""
        self._inner.forget_blob(digest)

    def receive(self, timeout: float) -> Event | None:
        """See `Transport`."""
        self._service.alive()
        return self._inner.receive(timeout)

    def deliver(self, event: Event) -> None:
        """See `Transport`."""
        self._inner.deliver(event)

    def close(self) -> None:
        """See `Transport`."""
        self._inner.close()

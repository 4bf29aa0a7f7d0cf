"""How much at a time, how fast, and when to try again. Pure: clocks and randomness are the caller's."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from edgetrain.protocol.blobs import DEFAULT_CHUNK_BYTES, MIN_CHUNK_BYTES

# A chunk should be on the way for no longer: what a cut takes with it is sent twice.
CHUNK_SECONDS = 0.2
# Unacknowledged bulk: enough to fill the pipe over a slow round trip, and what a control message waits for.
WINDOW_SECONDS = 1.0
MAX_WINDOW_BYTES = 4 << 20
FIRST_CHUNK_BYTES = 4 << 10
# A rate that no link here exceeds; what a clock that stands still measures.
MAX_RATE = 1e9


class RateMeter:
    """The speed of a link, from pieces that follow each other closely.

    Averages the time per byte, the newest counting half. So a pause slows down at once, and two pieces that happen
    to be handed over together at most double the rate.
    """

    def __init__(self) -> None:
        self._seconds_per_byte: float | None = None

    @property
    def rate(self) -> float | None:
        """Bytes per second; None before the first measurement."""
        return None if self._seconds_per_byte is None else 1 / self._seconds_per_byte

    def add(self, size: int, seconds: float) -> None:
        """`size` bytes took so long."""
        measured = max(seconds / size, 1 / MAX_RATE)
        before = self._seconds_per_byte
        self._seconds_per_byte = measured if before is None else (before + measured) / 2

    def chunk_bytes(self, most: int = DEFAULT_CHUNK_BYTES) -> int:
        """Payload of the next chunk: what the link carries in `CHUNK_SECONDS`, 1 KiB to `most`."""
        wanted = FIRST_CHUNK_BYTES if self.rate is None else int(self.rate * CHUNK_SECONDS)
        return min(max(wanted, MIN_CHUNK_BYTES), most)

    def window_bytes(self, seconds: float = WINDOW_SECONDS, most: int = MAX_WINDOW_BYTES) -> int:
        """What may be on the way at once: what the link carries in so many seconds, at least two chunks."""
        least = 2 * self.chunk_bytes()
        return least if self.rate is None else max(least, min(int(self.rate * seconds), most))


class TokenBucket:
    """A bandwidth cap.

    Args:
        rate: bytes per second; 0 for no cap.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        # What may go at once after a pause.
        self._burst = max(rate * CHUNK_SECONDS, float(MIN_CHUNK_BYTES))
        self._tokens = self._burst
        self._updated: float | None = None

    def within(self, size: int, seconds: float = CHUNK_SECONDS) -> int:
        """At most what the cap lets through in so many seconds, at least 1 KiB."""
        return min(size, max(int(self.rate * seconds), MIN_CHUNK_BYTES)) if self.rate else size

    def wait(self, now: float) -> float:
        """Seconds until something may go."""
        if not self.rate:
            return 0.0
        if self._updated is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._updated) * self.rate)
        self._updated = now
        return 0.0 if self._tokens > 0 else (1.0 - self._tokens) / self.rate

    def take(self, size: int) -> None:
        """So much goes; more than there is, is paid off before the next."""
        if self.rate:
            self._tokens -= size


@dataclass(slots=True)
class Backoff:
    """Delays between attempts to connect: exponential, each uniform in (0, ceiling] ("full jitter").

    Brooker 2015, "Exponential Backoff and Jitter": a thousand clients that lose their broker together do not come
    back together. The ceiling starts at `first` seconds and doubles up to `most`.
    """

    random: Random
    first: float = 1.0
    most: float = 60.0
    _attempts: int = 0

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        ceiling = min(self.first * 2.0**self._attempts, self.most)
        self._attempts = min(self._attempts + 1, 30)
        return ceiling * (1.0 - self.random.random())

    def reset(self) -> None:
        """It worked: the next delay is a first one."""
        self._attempts = 0

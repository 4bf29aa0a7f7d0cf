"""Who is who: the clients that the coordinator knows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edgetrain.protocol.messages import DeviceInfo, DeviceState, Resources


@dataclass(slots=True)
class ClientRecord:
    """One client."""

    name: str
    # Pinned at the first Hello of the run: the name belongs to this key.
    public_key: bytes
    connection: bytes = b""
    online: bool = False
    # It has the bundle and its self-test passed.
    ready: bool = False
    num_examples: int = 0
    runtime: str = ""
    # Codec stages that it knows.
    stages: frozenset[str] = frozenset()
    device: DeviceInfo = DeviceInfo()
    # How it was when it said so last.
    state: DeviceState = DeviceState()
    # What its updates reported last.
    resources: Resources = Resources()
    # (round, digest) of its last accepted update.
    last_accepted: tuple[int, bytes] | None = None
    # Payload bytes from it so far; and what earlier rounds have counted of its traffic.
    bytes_up: int = 0
    counted_up: int = 0
    counted_down: int = 0
    # On the coordinator's clock: not listened to until then.
    banned_until: float = 0.0
    # Ids of its connections before this one, newest last: what comes from one of them again is a copy.
    earlier_connections: deque[bytes] = field(default_factory=lambda: deque(maxlen=64))


class Roster:
    """All known clients, by name.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._clients: dict[str, ClientRecord] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, name: str) -> bool:
        return name in self._clients

    def __getitem__(self, name: str) -> ClientRecord:
        return self._clients[name]

    def get(self, name: str) -> ClientRecord | None:
        """The record, if there is one."""
        return self._clients.get(name)

    def add(self, record: ClientRecord) -> None:
        """Adds a client."""
        self._clients[record.name] = record

    def all(self) -> list[ClientRecord]:
        """In the order of their names."""
        return [self._clients[name] for name in sorted(self._clients)]

    def eligible(self) -> list[str]:
        """Names of those who can be invited now, sorted: selection must not depend on who came first."""
        now = self._clock()
        return [record.name for record in self.all() if record.online and record.ready and record.banned_until <= now]


def select_random(eligible: list[str], count: int, *, seed: int, round_number: int, attempt: int) -> list[str]:
    """A uniform choice of at most `count` names; the same arguments give the same choice."""
    generator = np.random.default_rng((seed, round_number, attempt))
    chosen = generator.permutation(len(eligible))[:count]
    return [eligible[index] for index in sorted(chosen)]

"""A session of secure aggregation without a network: members and a server, and every place to drop out."""

from __future__ import annotations

import hashlib
import random as stdlib_random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation import member as members
from edgetrain.protocol.secure_aggregation import server as servers
from edgetrain.protocol.secure_aggregation.arithmetic import Layout, Quantizer, unpack
from edgetrain.protocol.secure_aggregation.masks import Masker
from edgetrain.protocol.secure_aggregation.messages import Settings, encode, session_digest
from edgetrain.protocol.secure_aggregation.unmasking import unmask
from edgetrain.protocol.signing import SigningKey


class Stream:
    """Random bytes that a seed stands for."""

    def __init__(self, seed: object) -> None:
        self._generator = stdlib_random.Random(repr(seed))

    def __call__(self, count: int) -> bytes:
        return self._generator.randbytes(count)


def settings_of(count: int, **changes) -> Settings:
    fields = {"minimum": 2, "count": count, "seed": 1, "quantizer": Quantizer(range=1.0)} | changes
    return Settings(**fields)


@dataclass
class Session:
    """Runs the phases in order; who is named in `gone` sends nothing from that phase on.

    After `run`, `sum` holds what the server got, or None if it had to give up; `given_up` says why.
    """

    size: int
    settings: Settings
    seed: object = 0
    neighbours: int = 0
    threshold: int = 0
    dropout: float = 0.0
    vectors: Callable[[int, Layout], np.ndarray] | None = None
    nonce: bytes = b"n" * 16
    # Of enrolment.
    proof: Callable[[int], bytes] = lambda _client: b""
    server: servers.Server = field(init=False)
    members: dict[int, members.Member] = field(default_factory=dict)
    integers: dict[int, np.ndarray] = field(default_factory=dict)
    payloads: dict[int, bytes] = field(default_factory=dict)
    uplink: dict[int, int] = field(default_factory=dict)
    total: np.ndarray | None = None
    sum: np.ndarray | None = None
    given_up: str = ""

    def __post_init__(self) -> None:
        self.keys = [SigningKey(hashlib.sha256(f"{self.seed}/{i}".encode()).digest()) for i in range(self.size)]
        self.session = session_digest(
            federation="f",
            run=b"r" * 16,
            round_number=1,
            nonce=self.nonce,
            work=bytes(32),
            settings=encode(self.settings),
        )
        self.server = servers.Server(session=self.session, settings=encode(self.settings))
        self.randoms = [Stream((self.seed, i)) for i in range(self.size)]

    def name(self, client: int) -> str:
        return f"client-{client:04d}"

    def receive(self, client: int, message) -> None:
        self.uplink[client] = self.uplink.get(client, 0) + len(encode(message))
        self.server = servers.receive(self.server, self.name(client), self.keys[client].public_key, message)

    def close(self) -> None:
        self.server = servers.close(
            self.server, dropout=self.dropout, neighbours=self.neighbours, threshold=self.threshold
        )

    # --- the phases --------------------------------------------------------------------------------------------

    def advertise(self, clients: Iterable[int]) -> None:
        for client in clients:
            self.members[client], message = members.advertise(
                session=self.session, settings=encode(self.settings), name=self.name(client),
                identity=self.keys[client].public_key, sign=self.keys[client].sign, random=self.randoms[client],
                enrolment=self.proof(client),
            )  # fmt: skip
            self.receive(client, message)
        self.close()

    def position(self, client: int) -> int:
        return self.server.cast.positions[self.name(client)]

    def share(self, clients: Iterable[int]) -> None:
        for client in clients:
            self.members[client], message = members.share(
                self.members[client], self.server.roster, random=self.randoms[client]
            )
            self.receive(client, message)
        self.close()

    def vector(self, client: int) -> np.ndarray:
        layout = self.server.cast.layout
        if self.vectors:
            return self.vectors(client, layout)
        generator = np.random.default_rng([client, 7])
        return generator.integers(-127, 128, layout.length)

    def mask(self, clients: Iterable[int]) -> None:
        layout = self.server.cast.layout
        if self.total is None:
            self.total = Masker(layout.length, layout.bits).zeros()
        for client in clients:
            if self.position(client) not in self.server.present:
                continue
            self.integers[client] = self.vector(client)
            boxes = servers.boxes_for(self.server, self.position(client))
            self.members[client], payload = members.mask(self.members[client], boxes, self.integers[client])
            self.payloads[client] = payload
            self.uplink[client] += len(payload)
            self.server = servers.note_masked(self.server, self.name(client))
            self.total += unpack(payload, layout)
        self.close()

    def agree(self, clients: Iterable[int]) -> None:
        for client in clients:
            if self.position(client) in self.server.masked:
                self.members[client], message = members.agree(
                    self.members[client], servers.survivors_message(self.server), sign=self.keys[client].sign
                )
                self.receive(client, message)
        self.close()

    def reveal(self, clients: Iterable[int]) -> None:
        for client in clients:
            if self.position(client) in self.server.agreements:
                self.members[client], message = members.reveal(
                    self.members[client], servers.agreements_for(self.server, self.position(client))
                )
                self.receive(client, message)
        self.close()

    def run(self, gone: dict[str, set[int]] | None = None) -> Session:
        """All phases; gives up where the server does."""
        there = set(range(self.size))
        try:
            for phase in ("advertise", "share", "mask", "agree", "reveal"):
                there -= (gone or {}).get(phase, set())
                getattr(self, phase)(sorted(there))
            assert self.total is not None
            self.sum = unmask(self.server, self.total)
        except SecureAggregationError as error:
            self.given_up = str(error)
        return self

    @property
    def survivors(self) -> list[int]:
        return sorted(client for client in self.payloads if self.position(client) in self.server.masked)

    def plain_sum(self) -> np.ndarray:
        """Of the survivors' integers, modulo 2^bits: what an honest protocol must give."""
        layout = self.server.cast.layout
        total = sum(self.integers[client].astype(object) for client in self.survivors)
        return np.array([int(value) % 2**layout.bits for value in np.atleast_1d(total)], dtype=object)

    def unmasked(self) -> np.ndarray:
        assert self.sum is not None
        layout = self.server.cast.layout
        return np.array([int(value) % 2**layout.bits for value in self.sum], dtype=object)

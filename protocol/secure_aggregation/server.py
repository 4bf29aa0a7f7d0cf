"""The coordinator's side of a session, as a plain value. It routes what it cannot read.

Bonawitz et al., CCS 2017, figure 4, with the neighbourhoods of Bell et al., CCS 2020. The phases, each closed by
its owner when everybody has answered or enough have and time is up:

    advertise -> share -> mask -> agree -> reveal

`receive` takes a client's message, `close` ends a phase. The masked vectors themselves are not kept: they are
summed as they come, and `masked` notes whose are in the sum. A message that does not fit raises and changes
nothing; a repeated one changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from edgetrain.protocol.ed25519 import is_signed
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation import keys
from edgetrain.protocol.secure_aggregation.graph import choose_topology
from edgetrain.protocol.secure_aggregation.messages import (
    BOX_BYTES,
    MAX_NEIGHBOURS,
    Advertise,
    Agreement,
    Agreements,
    Boxes,
    Cast,
    FromMember,
    Peer,
    Reveal,
    Roster,
    Shares,
    Survivors,
    decode_settings,
    encode,
    keys_statement,
    open_roster,
    pieces,
    survivors_statement,
)
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES

Phase = Literal["advertise", "share", "mask", "agree", "reveal", "done"]

# Any scalar will do to find out whether a public key is of small order.
_PROBE = bytes(range(32))


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator in one session. Clients are positions in the roster, once there is one."""

    session: bytes
    # As the plan has them.
    settings: bytes
    phase: Phase = "advertise"
    # By name, until there is a roster.
    peers: dict[str, Peer] = {}
    roster: bytes = b""
    shares: dict[int, Shares] = {}
    # Whose shares were passed on: those whose masks are in the vectors.
    present: frozenset[int] = frozenset()
    # Whose vectors have arrived; when the phase is closed, who survived.
    masked: frozenset[int] = frozenset()
    agreements: dict[int, bytes] = {}
    reveals: dict[int, Reveal] = {}

    @property
    def cast(self) -> Cast:
        """What follows from the roster."""
        return open_roster(self.roster, self.session, self.settings)

    def name(self, client: int) -> str:
        """Of a position."""
        return self.cast.roster.peers[client].name

    @property
    def asked(self) -> frozenset[int]:
        """Those who should answer in this phase."""
        match self.phase:
            case "share":
                return frozenset(range(len(self.cast.roster.peers)))
            case "mask":
                return self.present
            case "agree":
                return self.masked
            case "reveal":
                return frozenset(self.agreements)
            case _:
                return frozenset()

    @property
    def answered(self) -> frozenset[int]:
        """Those who have."""
        match self.phase:
            case "share":
                return frozenset(self.shares)
            case "mask":
                return self.masked
            case "agree":
                return frozenset(self.agreements)
            case "reveal":
                return frozenset(self.reveals)
            case _:
                return frozenset()

    def statement(self) -> bytes:
        """What clients sign of the survivors."""
        return survivors_statement(self.cast.digest, self.cast.bits(self.masked))


def receive(server: Server, name: str, identity: bytes, message: FromMember) -> Server:
    """Takes a client's message; which client, its envelope has proved.

    Args:
        server: so far.
        name: of the client.
        identity: its Ed25519 public key.
        message: from it.

    Raises:
        SecureAggregationError: it does not fit.
    """
    if isinstance(message, Advertise):
        return _on_advertise(server, name, identity, message)
    client = server.cast.positions.get(name) if server.roster else None
    if client is None:
        raise SecureAggregationError(f"{name} is not in the roster")
    match message:
        case Shares():
            return _on_shares(server, client, message)
        case Agreement():
            return _on_agreement(server, client, message)
        case Reveal():
            return _on_reveal(server, client, message)


def note_masked(server: Server, name: str) -> Server:
    """A client's vector has arrived, whole: the caller adds it to the sum.

    Raises:
        SecureAggregationError: it must not be added; see `admits_masked`.
    """
    if objection := admits_masked(server, name):
        raise SecureAggregationError(objection)
    return msgspec.structs.replace(server, masked=server.masked | {server.cast.positions[name]})


def admits_masked(server: Server, name: str) -> str:
    """Why a client's vector is not welcome; "" if it is."""
    if server.phase in {"advertise", "share"}:
        return "a masked vector before the shares were passed on"
    client = server.cast.positions.get(name)
    if client not in server.present:
        return "not among those whose shares were passed on"
    if server.phase != "mask":
        return "too late: it counts as dropped out"
    return "its vector is already in the sum" if client in server.masked else ""


# --- ending a phase --------------------------------------------------------------------------------------------------


def close(server: Server, *, dropout: float = 0.0, neighbours: int = 0, threshold: int = 0) -> Server:
    """Ends the phase with those who have answered.

    Args:
        server: in any phase but the last.
        dropout: for choosing the topology, when advertising ends: the largest share that may drop out.
        neighbours: instead of choosing it; with fewer clients, everybody is everybody's neighbour.
        threshold: instead of choosing it.

    Raises:
        SecureAggregationError: too few have; the session is over, and nothing was revealed.
    """
    match server.phase:
        case "advertise":
            return _make_roster(server, dropout, neighbours, threshold)
        case "share":
            present = _with_enough_holders(server.cast, frozenset(server.shares))
            _check_minimum(server, present, "sent shares that enough neighbours hold")
            return msgspec.structs.replace(server, phase="mask", present=present)
        case "mask":
            _check_minimum(server, server.masked, "sent a masked vector")
            _check_recoverable(server, server.masked)
            return msgspec.structs.replace(server, phase="agree")
        case "agree":
            _check_recoverable(server, frozenset(server.agreements))
            return msgspec.structs.replace(server, phase="reveal")
        case _:
            _check_recoverable(server, frozenset(server.reveals))
            return msgspec.structs.replace(server, phase="done")


def has_enough(server: Server) -> bool:
    """Whether the phase could be closed with those who have answered so far."""
    if server.phase == "advertise":
        return len(server.peers) >= decode_settings(server.settings).minimum
    try:
        close(server)
    except SecureAggregationError:
        return False
    return True


def _make_roster(server: Server, dropout: float, neighbours: int, threshold: int) -> Server:
    settings, size = decode_settings(server.settings), len(server.peers)
    if size < settings.minimum:
        raise SecureAggregationError(f"{size} clients have advertised keys, {settings.minimum} are needed")
    degree, least = choose_topology(size, dropout=dropout, colluding=settings.colluding, lying=settings.lying)
    if neighbours:
        degree = min(size - 1, neighbours)
        least = (degree + 1) // 2 + 1
    if degree > MAX_NEIGHBOURS:
        raise SecureAggregationError(
            f"{size} clients need {degree} neighbours each, {MAX_NEIGHBOURS} are the most: lower max_dropout or "
            "max_colluding, or invite fewer"
        )
    roster = Roster(
        neighbours=degree,
        threshold=threshold or least,
        peers=tuple(server.peers[name] for name in sorted(server.peers)),
    )
    return msgspec.structs.replace(server, phase="share", roster=encode(roster), peers={})


def _with_enough_holders(cast: Cast, clients: frozenset[int]) -> frozenset[int]:
    """Those of whose holders enough are among them, too."""
    while True:
        kept = frozenset(
            client
            for client in clients
            if len(clients.intersection(cast.graph.holders(client))) >= cast.roster.threshold
        )
        if kept == clients:
            return kept
        clients = kept


def _check_minimum(server: Server, clients: frozenset[int], what: str) -> None:
    minimum = decode_settings(server.settings).minimum
    if len(clients) < minimum:
        raise SecureAggregationError(f"{len(clients)} clients {what}, {minimum} are needed")


def _check_recoverable(server: Server, helpers: frozenset[int]) -> None:
    """Whether the secrets of all who are needed can be had from these."""
    cast = server.cast
    for client in needed_secrets(server):
        near = len(helpers.intersection(cast.graph.holders(client)))
        if near < cast.roster.threshold:
            raise SecureAggregationError(
                f"{near} of those who hold shares of {server.name(client)} are left, {cast.roster.threshold} are needed"
            )


def needed_secrets(server: Server) -> list[int]:
    """Whose secrets must be put together: of every survivor, and of whoever dropped out and shares masks with one."""
    cast = server.cast
    return [
        client
        for client in sorted(server.present)
        if client in server.masked or not server.masked.isdisjoint(cast.graph.neighbours(client))
    ]


# --- what a client is told -------------------------------------------------------------------------------------------


def boxes_for(server: Server, client: int) -> Boxes:
    """What its neighbours sealed for a client."""
    cast = server.cast
    boxes = [
        _box(server.shares[neighbour].boxes, cast.graph.neighbours(neighbour).index(client))
        for neighbour in cast.graph.neighbours(client)
        if neighbour in server.present
    ]
    return Boxes(present=cast.bits(server.present), boxes=b"".join(boxes))


def _box(boxes: bytes, place: int) -> bytes:
    return boxes[BOX_BYTES * place : BOX_BYTES * (place + 1)]


def survivors_message(server: Server) -> Survivors:
    """The same for everybody."""
    return Survivors(survivors=server.cast.bits(server.masked))


def agreements_for(server: Server, client: int) -> Agreements:
    """What its neighbours signed."""
    neighbours = server.cast.graph.neighbours(client)
    return Agreements(signatures=tuple(server.agreements.get(neighbour, b"") for neighbour in neighbours))


def names(server: Server, clients: Iterable[int]) -> list[str]:
    """Of positions, in their order."""
    return [server.name(client) for client in sorted(clients)]


# --- messages --------------------------------------------------------------------------------------------------------


def _on_advertise(server: Server, name: str, identity: bytes, message: Advertise) -> Server:
    known = server.peers.get(name)
    peer = Peer(name, identity, message.cipher_key, message.mask_key, message.signature, message.enrolment)
    if peer == known:
        return server
    if server.phase != "advertise":
        cast = server.cast
        position = cast.positions.get(name)
        if position is not None and cast.roster.peers[position] == peer:
            return server
        raise SecureAggregationError("too late: the roster is made")
    if known:
        raise SecureAggregationError("other keys than it has advertised before")
    statement = keys_statement(server.session, name, message.cipher_key, message.mask_key)
    if not is_signed(identity, statement, message.signature):
        raise SecureAggregationError("the keys are not signed for this session")
    taken = {key for other in server.peers.values() for key in (other.identity, other.cipher_key, other.mask_key)}
    own = {identity, message.cipher_key, message.mask_key}
    if len(own) < 3 or own & taken:
        raise SecureAggregationError("keys that are equal to another client's, or to each other")
    for key in (message.cipher_key, message.mask_key):
        keys.agree(_PROBE, key)
    return msgspec.structs.replace(server, peers={**server.peers, name: peer})


def _on_shares(server: Server, client: int, message: Shares) -> Server:
    if server.shares.get(client) == message:
        return server
    if server.phase != "share":
        raise SecureAggregationError("too late: the shares are passed on")
    if client in server.shares:
        raise SecureAggregationError("other shares than it has sent before")
    if message.roster != server.cast.digest:
        raise SecureAggregationError("shares for another roster")
    pieces(message.boxes, BOX_BYTES, server.cast.roster.neighbours)
    return msgspec.structs.replace(server, shares={**server.shares, client: message})


def _on_agreement(server: Server, client: int, message: Agreement) -> Server:
    if client in server.agreements:
        return server
    if server.phase != "agree" or client not in server.masked:
        raise SecureAggregationError("nobody has asked it for its agreement")
    if not is_signed(server.cast.roster.peers[client].identity, server.statement(), message.signature):
        raise SecureAggregationError("it has signed other survivors")
    return msgspec.structs.replace(server, agreements={**server.agreements, client: message.signature})


def _on_reveal(server: Server, client: int, message: Reveal) -> Server:
    if client in server.reveals:
        return server
    if server.phase != "reveal" or client not in server.agreements:
        raise SecureAggregationError("nobody has asked it for shares")
    holders = server.present.intersection(server.cast.graph.holders(client))
    pieces(message.shares, SHARE_BYTES, len(holders))
    return msgspec.structs.replace(server, reveals={**server.reveals, client: message})

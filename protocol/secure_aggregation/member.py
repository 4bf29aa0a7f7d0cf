"""The client's side of a session, as a plain value: every step takes a `Member` and a message and returns the next.

Bonawitz et al., CCS 2017, figure 4, with the neighbourhoods of Bell et al., CCS 2020. A value can be written to
disk at any time (`msgspec.msgpack.encode`) and goes on from there. It is secret: the keys of the session are in it,
until the vector has been masked, and then shares of others', until one of each has been revealed.

Every step can be repeated with the message that it was made with and gives the same answer again. Another message
in its place is refused, above all a second set of survivors: a client signs one and reveals for one, so that it
never gives away both kinds of share of the same peer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from edgetrain.protocol.ed25519 import is_signed
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation import keys
from edgetrain.protocol.secure_aggregation.arithmetic import Integers, pack
from edgetrain.protocol.secure_aggregation.graph import is_secure
from edgetrain.protocol.secure_aggregation.masks import Masker
from edgetrain.protocol.secure_aggregation.messages import (
    BOX_BYTES,
    Advertise,
    Agreement,
    Agreements,
    Boxes,
    Cast,
    Peer,
    Reveal,
    Shares,
    Survivors,
    decode_settings,
    encode,
    keys_statement,
    open_roster,
    pieces,
    survivors_statement,
)
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES, Random, split

Sign = Callable[[bytes], bytes]
"""Ed25519, by the client's identity."""

IsEnrolled = Callable[[str, bytes, bytes], bool]
"""Whether a client of this name, Ed25519 key and proof of enrolment may take part."""

NO_SHARES = bytes(2 * SHARE_BYTES)
Answer = TypeVar("Answer", bound=msgspec.Struct)
Phase = Literal["advertised", "shared", "masked", "agreed", "revealed"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One client in one session."""

    session: bytes
    # As the plan has them.
    settings: bytes
    name: str
    identity: bytes
    phase: Phase = "advertised"
    # The last message, encoded.
    reply: bytes = b""
    # Gone once the vector is masked.
    cipher_private: bytes = b""
    mask_private: bytes = b""
    seed: bytes = b""
    # As it came.
    roster: bytes = b""
    # Positions of those whose shares were received.
    present: tuple[int, ...] = ()
    # By position: a share of the mask key, then one of the seed. Gone once revealed.
    held: dict[int, bytes] = {}
    # The bitmap.
    survivors: bytes = b""

    @property
    def cast(self) -> Cast:
        """What follows from the roster."""
        return open_roster(self.roster, self.session, self.settings)

    def __repr__(self) -> str:
        return f"Member({self.name}, {self.phase})"


def advertise(
    *,
    session: bytes,
    settings: bytes,
    name: str,
    identity: bytes,
    sign: Sign,
    random: Random,
    enrolment: bytes = b"",
) -> tuple[Member, Advertise]:
    """The first step: fresh keys.

    Args:
        session: from `session_digest`.
        settings: of the plan.
        name: of the client.
        identity: its Ed25519 public key.
        sign: by that.
        random: a cryptographically strong source.
        enrolment: proof that the federation's CA has enrolled it, if it has one.

    Raises:
        SecureAggregationError: the settings are none.
    """
    decode_settings(settings)
    cipher_private, mask_private, seed = random(32), random(32), random(32)
    cipher_key, mask_key = keys.public_key(cipher_private), keys.public_key(mask_private)
    message = Advertise(
        cipher_key=cipher_key,
        mask_key=mask_key,
        signature=sign(keys_statement(session, name, cipher_key, mask_key)),
        enrolment=enrolment,
    )
    member = Member(
        session=session,
        settings=settings,
        name=name,
        identity=identity,
        reply=encode(message),
        cipher_private=cipher_private,
        mask_private=mask_private,
        seed=seed,
    )
    return member, message


def share(
    member: Member,
    roster: bytes,
    *,
    random: Random,
    is_enrolled: IsEnrolled = lambda _name, _identity, _proof: True,
    least_clients: int = 2,
    colluding: float = 0.0,
) -> tuple[Member, Shares]:
    """The second: shares of this client's secrets, sealed for its neighbours.

    Args:
        member: advertised.
        roster: a `Roster`, encoded.
        random: a cryptographically strong source.
        is_enrolled: whether a neighbour may take part.
        least_clients: fewest clients that this one takes part with, whatever the plan says.
        colluding: share of the clients that may collude with a lying coordinator, whatever the plan says.

    Raises:
        SecureAggregationError: not with this roster.
    """
    if member.phase != "advertised":
        return member, _repeated(member, Shares, same=roster == member.roster and member.phase == "shared")
    settings = decode_settings(member.settings)
    cast = open_roster(roster, member.session, member.settings)
    peers, own = cast.roster.peers, cast.positions.get(member.name)
    cipher_key, mask_key = keys.public_key(member.cipher_private), keys.public_key(member.mask_private)
    if own is None or (peers[own].identity, peers[own].cipher_key, peers[own].mask_key) != (
        member.identity,
        cipher_key,
        mask_key,
    ):
        raise SecureAggregationError("the roster does not have this client's own keys")
    if len(peers) < least_clients:
        raise SecureAggregationError(f"{len(peers)} clients are fewer than this client takes part with")
    size, degree, threshold = len(peers), cast.roster.neighbours, cast.roster.threshold
    for fraction, lying in ((settings.colluding, settings.lying), (colluding, True)):
        if not is_secure(size, degree, threshold, colluding=fraction, lying=lying):
            raise SecureAggregationError(
                f"{degree} neighbours with a threshold of {threshold} are too few for {size} clients"
            )
    honest = settings.minimum - math.floor(max(settings.colluding, colluding) * size)
    if settings.noise_multiplier and settings.noise_shares > honest:
        raise SecureAggregationError(
            f"the noise is made of {settings.noise_shares} shares, and a sum may hold those of {honest} honest clients "
            "only"
        )
    for neighbour in cast.graph.neighbours(own):
        _check_peer(member.session, peers[neighbour], is_enrolled)
    holders = cast.graph.holders(own)
    points = [holder + 1 for holder in holders]
    pairs = zip(split(member.mask_private, points, threshold, random), split(member.seed, points, threshold, random),
                strict=True)  # fmt: skip
    shares = {holder: of_key + of_seed for holder, (of_key, of_seed) in zip(holders, pairs, strict=True)}
    boxes = []
    for neighbour in cast.graph.neighbours(own):
        key = keys.box_key(member.cipher_private, cipher_key, peers[neighbour].cipher_key, member.session, sending=True)
        boxes.append(keys.seal_box(key, shares[neighbour], member.session))
    message = Shares(roster=cast.digest, commitment=keys.commitment(member.seed), boxes=b"".join(boxes))
    after = msgspec.structs.replace(
        member, phase="shared", roster=roster, held={own: shares[own]}, reply=encode(message)
    )
    return after, message


def mask(member: Member, boxes: Boxes, integers: Integers) -> tuple[Member, bytes]:
    """The third: the vector under a mask of its own and one with each neighbour that is present.

    Args:
        member: shared.
        boxes: from the coordinator.
        integers: int64 [layout.length] of `member.cast.layout`.

    Returns:
        The member, and the packed vector.

    Raises:
        SecureAggregationError: not with these.
    """
    if member.phase != "shared":
        raise SecureAggregationError("the vector of this session is already masked")
    cast = member.cast
    own, layout, peers = cast.positions[member.name], cast.layout, cast.roster.peers
    present = cast.members(boxes.present)
    _check_enough(member, present, "whose shares were received")
    neighbours = [client for client in cast.graph.neighbours(own) if client in present]
    received = pieces(boxes.boxes, BOX_BYTES, len(neighbours))
    cipher_key, mask_key = keys.public_key(member.cipher_private), keys.public_key(member.mask_private)
    held = dict(member.held)
    masker = Masker(layout.length, layout.bits)
    vector = masker.zeros()
    vector += integers.astype(vector.dtype)
    masker.add(vector, member.seed)
    for neighbour, box in zip(neighbours, received, strict=True):
        peer = peers[neighbour]
        key = keys.box_key(member.cipher_private, peer.cipher_key, cipher_key, member.session, sending=False)
        opened = keys.open_box(key, box, member.session)
        # A neighbour that seals nonsense, or a coordinator that spoils it, has one holder less for it.
        if opened is not None and len(opened) == 2 * SHARE_BYTES:
            held[neighbour] = opened
        common = keys.mask_key(member.mask_private, mask_key, peer.mask_key, member.session)
        if own < neighbour:
            masker.add(vector, common)
        else:
            masker.subtract(vector, common)
    after = msgspec.structs.replace(
        member,
        phase="masked",
        reply=b"",
        cipher_private=b"",
        mask_private=b"",
        seed=b"",
        present=tuple(sorted(present)),
        held=held,
    )
    return after, pack(vector, layout)


def agree(member: Member, message: Survivors, *, sign: Sign) -> tuple[Member, Agreement]:
    """The fourth: this client's word that it was told of these survivors.

    Args:
        member: masked.
        message: from the coordinator.
        sign: by the client's identity.

    Raises:
        SecureAggregationError: it will not reveal anything for those.
    """
    if member.phase != "masked":
        same = message.survivors == member.survivors and member.phase == "agreed"
        return member, _repeated(member, Agreement, same=same)
    cast = member.cast
    survivors = cast.members(message.survivors)
    if not survivors <= set(member.present):
        raise SecureAggregationError("survivors that were not there before")
    _check_enough(member, survivors, "who survived")
    statement = survivors_statement(cast.digest, message.survivors)
    agreement = Agreement(signature=sign(statement))
    after = msgspec.structs.replace(member, phase="agreed", survivors=message.survivors, reply=encode(agreement))
    return after, agreement


def reveal(member: Member, agreements: Agreements) -> tuple[Member, Reveal]:
    """The last: one share of each holder, of its seed if it survived, else of its mask key.

    Args:
        member: agreed.
        agreements: of its neighbours.

    Raises:
        SecureAggregationError: fewer than the threshold have signed the same survivors. Nothing was revealed.
    """
    if member.phase != "agreed":
        return member, _repeated(member, Reveal, same=member.phase == "revealed")
    cast = member.cast
    own, peers = cast.positions[member.name], cast.roster.peers
    statement = survivors_statement(cast.digest, member.survivors)
    survivors = cast.members(member.survivors)
    neighbours = cast.graph.neighbours(own)
    signed = 1 + sum(
        neighbour in survivors and is_signed(peers[neighbour].identity, statement, signature)
        for neighbour, signature in zip(neighbours, agreements.signatures, strict=False)
        if signature
    )
    if signed < cast.roster.threshold:
        raise SecureAggregationError(
            f"{signed} of {len(neighbours) + 1} have signed the same survivors, {cast.roster.threshold} are needed"
        )
    shares = []
    for holder in cast.graph.holders(own):
        if holder in member.present:
            held = member.held.get(holder, NO_SHARES)
            shares.append(held[SHARE_BYTES:] if holder in survivors else held[:SHARE_BYTES])
    message = Reveal(shares=b"".join(shares))
    return msgspec.structs.replace(member, phase="revealed", held={}, reply=encode(message)), message


def _check_peer(session: bytes, peer: Peer, is_enrolled: IsEnrolled) -> None:
    statement = keys_statement(session, peer.name, peer.cipher_key, peer.mask_key)
    if not is_signed(peer.identity, statement, peer.signature):
        raise SecureAggregationError(f"the keys of {peer.name!r} in the roster are not signed by it")
    if not is_enrolled(peer.name, peer.identity, peer.enrolment):
        raise SecureAggregationError(f"{peer.name!r} is in the roster with a key that is not enrolled")


def _check_enough(member: Member, clients: frozenset[int], which: str) -> None:
    cast, settings = member.cast, decode_settings(member.settings)
    own = cast.positions[member.name]
    if own not in clients:
        raise SecureAggregationError(f"this client is not among those {which}")
    if len(clients) < settings.minimum:
        raise SecureAggregationError(f"{len(clients)} clients {which}, the plan asks for {settings.minimum}")
    near = len(clients.intersection(cast.graph.holders(own)))
    if near < cast.roster.threshold:
        raise SecureAggregationError(
            f"{near} of this client's neighbourhood are among those {which}, {cast.roster.threshold} are needed"
        )


def _repeated(member: Member, kind: type[Answer], *, same: bool) -> Answer:
    """The same answer to the same message."""
    if not same:
        raise SecureAggregationError(f"a second message for a step that was done: {kind.__name__}")
    return msgspec.msgpack.decode(member.reply, type=kind)

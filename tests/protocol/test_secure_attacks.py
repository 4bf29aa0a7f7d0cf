"""Those who would know more than the sum: the coordinator, some clients with it, and whoever is on the wire."""

from __future__ import annotations

import itertools
import math
import os

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.enrolment import Authority, authority_key, prove_enrolment
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation import keys
from edgetrain.protocol.secure_aggregation import member as members
from edgetrain.protocol.secure_aggregation import server as servers
from edgetrain.protocol.secure_aggregation.arithmetic import Quantizer, unpack
from edgetrain.protocol.secure_aggregation.masks import Masker
from edgetrain.protocol.secure_aggregation.messages import (
    BOX_BYTES,
    Advertise,
    Agreement,
    Agreements,
    Boxes,
    Reveal,
    Roster,
    Shares,
    Survivors,
    decode_from_member,
    decode_from_server,
    decode_settings,
    encode,
    open_roster,
    pieces,
    session_digest,
    work_digest,
)
from edgetrain.protocol.secure_aggregation.noise import noise_bound, noise_of, share_of
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES, combine
from edgetrain.protocol.secure_aggregation.unmasking import recover, unmask
from edgetrain.protocol.training import TrainingConfig
from support.secure_session import Session, settings_of

PHASES = ("advertise", "share", "mask", "agree", "reveal")
COUNT = 40_000


def session_after(phase, size=4, **changes):
    """A session whose phases up to this one are done by everybody."""
    session = Session(size, settings_of(6), **changes)
    for name in PHASES[: PHASES.index(phase) + 1]:
        getattr(session, name)(range(size))
    return session


def uniformity(words, bits):
    """(chi-square over 256 bins, Kolmogorov-Smirnov statistic times the root of the length) of words modulo 2^bits."""
    values = np.sort(words.astype(np.float64) / 2**bits)
    counts = np.bincount((values * 256).astype(int), minlength=256)
    chi_square = ((counts - len(values) / 256) ** 2 / (len(values) / 256)).sum()
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(values - steps[:-1]).max(), np.abs(values - steps[1:]).max())
    return chi_square, distance * math.sqrt(len(values))


def assert_uniform(words, bits):
    # 255 degrees of freedom: standard deviation 22.6. A KS statistic above 1.95 has a chance of 0.001.
    chi_square, distance = uniformity(words, bits)
    assert chi_square < 255 + 4 * 22.6
    assert distance < 1.95


# --- what a whole transcript gives away ------------------------------------------------------------------------------


def attack(session, victim, colluding):
    """All that the server and some clients can take off a victim's vector: what is left of its mask, plus it."""
    cast, position = session.server.cast, session.position(victim)
    layout, peers = cast.layout, cast.roster.peers
    masker = Masker(layout.length, layout.bits)
    left = unpack(session.payloads[victim], layout).copy()
    given = shares_of(session, position, colluding)
    seed = recover(given["seed"], cast.roster.threshold, lambda s: keys.commitment(s) == session.server.shares[
        position].commitment)  # fmt: skip
    if seed is not None:
        masker.subtract(left, seed)
    for other in colluding:
        peer = peers[session.position(other)]
        common = keys.mask_key(session.secrets[other], peer.mask_key, peers[position].mask_key, session.session)
        if position < session.position(other):
            masker.subtract(left, common)
        else:
            masker.add(left, common)
    private = recover(given["key"], cast.roster.threshold, lambda s: keys.public_key(s) == peers[position].mask_key)
    modulus = layout.bits
    return left & left.dtype.type(2**modulus - 1), seed, private


def shares_of(session, position, colluding):
    """What of a client's secrets colluding clients hold, and the server was given."""
    found = {"key": {}, "seed": {}}
    cast = session.server.cast
    for other in colluding:
        held = session.before[other].get(position, b"")
        if held:
            found["key"][session.position(other) + 1] = held[:SHARE_BYTES]
            found["seed"][session.position(other) + 1] = held[SHARE_BYTES:]
    for giver, reveal in session.server.reveals.items():
        owners = [holder for holder in cast.graph.holders(giver) if holder in session.server.present]
        kind = "seed" if position in session.server.masked else "key"
        if position in owners and (share := pieces(reveal.shares, SHARE_BYTES, len(owners))[owners.index(position)]):
            found[kind][giver + 1] = share
    return {kind: sorted(shares.items()) for kind, shares in found.items()}


class Watched(Session):
    """A session whose secrets a test can look at, as their owners could."""

    def advertise(self, clients):
        super().advertise(clients)
        self.secrets = {client: member.mask_private for client, member in self.members.items()}

    def mask(self, clients):
        super().mask(clients)
        self.before = {client: dict(member.held) for client, member in self.members.items()}


@pytest.mark.parametrize("gone", [set(), {0}], ids=["everybody stays", "another honest client drops out"])
def test_t_minus_1_clients_and_the_server_do_not_learn_an_update(gone):
    """Seven clients, threshold 4, three of them and the server share all they have. Of an honest client's vector
    they can take off its own mask and those with them; what is left is uniform whatever the update is."""
    colluding, victim = [4, 5, 6], 1
    session = Watched(7, settings_of(COUNT), vectors=lambda client, layout: np.full(layout.length, client))
    session.run({"mask": gone})
    assert not session.given_up
    assert session.server.cast.roster.neighbours == 6, "everybody is everybody's neighbour"
    assert session.server.cast.roster.threshold == 4 == len(colluding) + 1
    left, seed, private = attack(session, victim, colluding)
    # The coordinator rightly has the seed of a survivor; with t - 1 shares of the mask key nobody has that.
    assert seed is not None
    assert private is None
    assert_uniform(left, session.server.cast.layout.bits)


def test_the_same_attack_with_one_share_more_succeeds():
    """So the attack above is a real one."""
    session = Watched(7, settings_of(COUNT), vectors=lambda client, layout: np.full(layout.length, 10 + client))
    session.run()
    colluding, victim = [3, 4, 5, 6], 1
    left, _seed, private = attack(session, victim, colluding)
    assert private is not None
    cast = session.server.cast
    masker = Masker(cast.layout.length, cast.layout.bits)
    own = session.position(victim)
    for other in (0, 2):
        peer = cast.roster.peers[session.position(other)]
        common = keys.mask_key(private, cast.roster.peers[own].mask_key, peer.mask_key, session.session)
        (masker.subtract if own < session.position(other) else masker.add)(left, common)
    np.testing.assert_array_equal(left & left.dtype.type(2**cast.layout.bits - 1), 11)


def test_a_client_that_dropped_out_late_is_not_unmasked():
    """Its vector comes after the survivors were named: the mask key is known then, its own seed is not."""
    session = Watched(5, settings_of(COUNT), vectors=lambda client, layout: np.full(layout.length, 3))
    session.advertise(range(5))
    session.share(range(5))
    boxes = servers.boxes_for(session.server, session.position(2))
    _, late = members.mask(session.members[2], boxes, session.vector(2))
    session.mask([0, 1, 3, 4])
    session.agree([0, 1, 3, 4])
    session.reveal([0, 1, 3, 4])
    cast = session.server.cast
    own = session.position(2)
    shares = shares_of(session, own, [])["key"]
    private = combine([point for point, _ in shares], [share for _, share in shares])
    masker = Masker(cast.layout.length, cast.layout.bits)
    left = unpack(late, cast.layout).copy()
    for other in set(range(5)) - {own}:
        common = keys.mask_key(private, cast.roster.peers[own].mask_key, cast.roster.peers[other].mask_key,
                               session.session)  # fmt: skip
        (masker.subtract if own < other else masker.add)(left, common)
    assert_uniform(left & left.dtype.type(2**cast.layout.bits - 1), cast.layout.bits)
    with pytest.raises(SecureAggregationError, match="too late"):
        servers.note_masked(session.server, session.name(2))


# --- a coordinator that lies -----------------------------------------------------------------------------------------


def test_both_kinds_of_shares():
    """First the survivors without client 3, then with it: nobody signs both, so nobody gives both kinds."""
    session = session_after("mask")
    cast = session.server.cast
    everybody, without = cast.bits(range(4)), cast.bits(range(3))
    member, _ = members.agree(session.members[0], Survivors(survivors=everybody), sign=session.keys[0].sign)
    with pytest.raises(SecureAggregationError, match="second message"):
        members.agree(member, Survivors(survivors=without), sign=session.keys[0].sign)
    # Also not from the copy on its disk, or after it has revealed.
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(member), type=members.Member)
    with pytest.raises(SecureAggregationError, match="second message"):
        members.agree(again, Survivors(survivors=without), sign=session.keys[0].sign)
    session.agree(range(4))
    member, first = members.reveal(session.members[0], servers.agreements_for(session.server, 0))
    with pytest.raises(SecureAggregationError, match="second message"):
        members.agree(member, Survivors(survivors=without), sign=session.keys[0].sign)
    assert members.reveal(member, Agreements(signatures=()))[1] == first


def test_two_sets_of_survivors_get_no_majority():
    """Half of the clients are told that all survived, half that client 3 did not: none of them reveals."""
    session = session_after("mask")
    cast = session.server.cast
    told = {0: cast.bits(range(4)), 1: cast.bits(range(4)), 2: cast.bits(range(3))}
    signed = {}
    for client, survivors in told.items():
        session.members[client], message = members.agree(
            session.members[client], Survivors(survivors=survivors), sign=session.keys[client].sign
        )
        signed[client] = message.signature
    for client in told:
        signatures = tuple(signed.get(other, b"") for other in cast.graph.neighbours(client))
        with pytest.raises(SecureAggregationError, match="have signed the same survivors"):
            members.reveal(session.members[client], Agreements(signatures=signatures))
        assert session.members[client].phase == "agreed"


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        ({1, 2, 3}, "this client is not among those who survived"),
        ({0, 1}, "2 of this client's neighbourhood are among those who survived, 3 are needed"),
        ({0}, "1 clients who survived, the plan asks for 2"),
    ],
)
def test_survivors_that_a_client_will_not_sign(survivors, why):
    session = session_after("mask")
    with pytest.raises(SecureAggregationError, match=why):
        members.agree(
            session.members[0], Survivors(survivors=session.server.cast.bits(survivors)), sign=session.keys[0].sign
        )


def test_survivors_that_never_shared():
    session = Session(5, settings_of(6))
    session.advertise(range(5))
    session.share(range(4))
    session.mask(range(4))
    with pytest.raises(SecureAggregationError, match="were not there before"):
        members.agree(
            session.members[0], Survivors(survivors=session.server.cast.bits(range(5))), sign=session.keys[0].sign
        )


@pytest.mark.parametrize("bits", [b"", b"\x0f\x00", b"\x1f"])
def test_bitmaps_of_another_length(bits):
    session = session_after("mask")
    with pytest.raises(SecureAggregationError, match="another length"):
        members.agree(session.members[0], Survivors(survivors=bits), sign=session.keys[0].sign)


def changed_roster(session, **changes):
    roster = msgspec.msgpack.decode(session.server.roster, type=Roster)
    return encode(msgspec.structs.replace(roster, **changes))


def test_keys_of_its_own_in_anothers_name():
    session = session_after("advertise")
    cast = session.server.cast
    peers = list(cast.roster.peers)
    private = bytes(range(32))
    peers[1] = msgspec.structs.replace(peers[1], cipher_key=keys.public_key(private))
    with pytest.raises(SecureAggregationError, match="'client-0001' in the roster are not signed by it"):
        members.share(session.members[0], changed_roster(session, peers=tuple(peers)), random=session.randoms[0])


def test_a_client_that_is_not_enrolled():
    session = session_after("advertise")
    known = {session.name(client): session.keys[client].public_key for client in range(3)}
    with pytest.raises(SecureAggregationError, match="'client-0003' is in the roster with a key that is not enrolled"):
        members.share(
            session.members[0],
            session.server.roster,
            random=session.randoms[0],
            is_enrolled=lambda name, key, _proof: known.get(name) == key,
        )


def test_noise_that_would_not_be_there():
    """Shares so small that a sum holds less than the plan says, or with no room for them, are refused by clients."""
    fields = {"minimum": 4, "noise_multiplier": 1.0, "max_norm": 1.0, "noise_shares": 4}
    session = Session(5, settings_of(6, **fields), neighbours=4, threshold=4)
    session.advertise(range(5))
    take = lambda session, **asked: members.share(
        session.members[0], session.server.roster, random=session.randoms[0], **asked
    )
    take(session)
    with pytest.raises(SecureAggregationError, match="made of 4 shares, and a sum may hold those of 3 honest clients"):
        take(session, colluding=0.2)
    session = Session(5, settings_of(6, **fields | {"noise_shares": 10_000}))
    session.advertise(range(5))
    with pytest.raises(SecureAggregationError, match="made of 10000 shares"):
        take(session)
    settings = settings_of(6, **fields)
    with pytest.raises(SecureAggregationError, match=r"noise of up to \d+ steps would be cut to 0"):
        share_of(settings, os.urandom)
    room = noise_bound(noise_of(settings))
    wide = msgspec.structs.replace(settings, quantizer=Quantizer(range=1.0, noise_bound=room))
    assert share_of(wide, os.urandom)(6).shape == (6,)


WORK = {"bundle": b"b" * 32, "vector": b"v" * 32, "training": TrainingConfig(learning_rate=0.1), "personal": ()}


@pytest.mark.parametrize("changes", [
    {"vector": b"w" * 32}, {"bundle": b"c" * 32}, {"training": TrainingConfig(learning_rate=0.0)},
    {"training": TrainingConfig(max_delta_norm=1e-9)}, {"personal": ("*",)},
])  # fmt: skip
def test_one_client_that_was_told_to_train_otherwise(changes):
    """Others whose updates are zero by what they were told would leave the sum to one: so keys are signed for what
    they were told, too, and a roster of both kinds is refused by either."""

    def session_for(**changed):
        return session_digest(federation="f", run=b"r" * 16, round_number=1, nonce=b"n" * 16,
                              work=work_digest(**WORK | changed), settings=encode(settings_of(6)))  # fmt: skip

    victim, others = Session(4, settings_of(6)), Session(4, settings_of(6))
    victim.session, others.session = session_for(**changes), session_for()
    for session in (victim, others):
        session.server = msgspec.structs.replace(session.server, session=session.session)
        session.advertise(range(4))
    # The coordinator does not mind whose keys are signed for what.
    peers = (victim.server.cast.roster.peers[0], *others.server.cast.roster.peers[1:])
    roster = encode(msgspec.structs.replace(others.server.cast.roster, peers=peers))
    for session, client, accused in ((victim, 0, "client-000[123]"), (others, 1, "client-0000")):
        with pytest.raises(SecureAggregationError, match=f"the keys of '{accused}' in the roster are not signed by it"):
            members.share(session.members[client], roster, random=session.randoms[client])


def test_how_long_a_device_trains_is_its_own_business():
    long = TrainingConfig(learning_rate=0.1, epochs=5, batch_size=4, max_steps=9)
    assert work_digest(**WORK | {"training": long}) == work_digest(**WORK)


def test_a_client_that_the_coordinator_has_made_up():
    """The CA has enrolled four; one of them is replaced by somebody with keys, and signatures, of its own."""
    ca = ec.generate_private_key(ec.SECP256R1())
    authority = Authority(authority_key(ca.public_key()), "f")
    prove = lambda name, key: prove_enrolment(ca, federation="f", name=name, public_key=key)
    session = Session(4, settings_of(6))
    session.proof = lambda client: prove(session.name(client), session.keys[client].public_key)
    session.advertise(range(4))

    def shares_of(client):
        return members.share(
            session.members[client],
            session.server.roster,
            random=session.randoms[client],
            is_enrolled=authority.has_enrolled,
        )

    shares_of(0)
    session = Session(4, settings_of(6))
    # It has a proof: that of another client, or of its own name with another key, and it is not worth anything.
    worthless = prove("client-0002", session.keys[2].public_key)
    session.proof = lambda client: (
        worthless if client == 3 else prove(session.name(client), session.keys[client].public_key)
    )
    session.advertise(range(4))
    with pytest.raises(SecureAggregationError, match="'client-0003' is in the roster with a key that is not enrolled"):
        shares_of(0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"threshold": 2}, "not a majority"),
        ({"threshold": 5}, "not a majority"),
        ({"neighbours": 2, "threshold": 1}, "not a majority"),
        ({"neighbours": 5}, "no graph"),
    ],
)
def test_a_weaker_topology_than_there_may_be(changes, why):
    session = session_after("advertise")
    with pytest.raises(SecureAggregationError, match=why):
        members.share(session.members[0], changed_roster(session, **changes), random=session.randoms[0])


def test_too_few_neighbours_for_those_who_may_collude():
    session = Session(60, settings_of(3, colluding=0.2), neighbours=58, threshold=45)
    session.advertise(range(60))
    with pytest.raises(SecureAggregationError, match="4 neighbours with a threshold of 4 are too few"):
        members.share(session.members[0], changed_roster(session, neighbours=4, threshold=4),
                      random=session.randoms[0])  # fmt: skip


def test_a_client_has_its_own_idea_of_how_many_collude():
    """The coordinator says that nobody does; the client does not take its word for it."""
    session = Session(60, settings_of(3, colluding=0.0), neighbours=20)
    session.advertise(range(60))
    roster, random = session.server.roster, session.randoms[0]
    with pytest.raises(SecureAggregationError, match="20 neighbours with a threshold of 11 are too few"):
        members.share(session.members[0], roster, random=random, colluding=0.1)
    assert members.share(session.members[0], roster, random=random)[0].phase == "shared"


def test_fewer_clients_than_this_one_takes_part_with():
    session = session_after("advertise")
    with pytest.raises(SecureAggregationError, match="4 clients are fewer"):
        members.share(session.members[0], session.server.roster, random=session.randoms[0], least_clients=5)


def test_another_roster_for_a_client_that_has_shared():
    session = session_after("share")
    other = Session(4, settings_of(6), seed="other")
    other.advertise(range(4))
    with pytest.raises(SecureAggregationError, match="second message"):
        members.share(session.members[0], other.server.roster, random=session.randoms[0])


def test_a_roster_without_this_client_or_with_others_keys_for_it():
    session = session_after("advertise")
    roster = msgspec.msgpack.decode(session.server.roster, type=Roster)
    with pytest.raises(SecureAggregationError, match="own keys"):
        members.share(session.members[3], changed_roster(session, peers=roster.peers[:3], neighbours=2, threshold=2),
                      random=session.randoms[3])  # fmt: skip


def test_a_vector_is_masked_once():
    """With the same keys and another vector, the difference of the two would be in the open."""
    session = session_after("share")
    boxes = servers.boxes_for(session.server, 0)
    member, _ = members.mask(session.members[0], boxes, session.vector(0))
    assert (member.cipher_private, member.mask_private, member.seed) == (b"", b"", b"")
    with pytest.raises(SecureAggregationError, match="already masked"):
        members.mask(member, boxes, session.vector(0))


def test_fewer_neighbours_than_the_threshold_are_present():
    session = session_after("share")
    boxes = servers.boxes_for(session.server, 0)
    few = Boxes(present=session.server.cast.bits([0, 1]), boxes=boxes.boxes[:BOX_BYTES])
    with pytest.raises(SecureAggregationError, match="2 of this client's neighbourhood"):
        members.mask(session.members[0], few, session.vector(0))


# --- clients with equal keys, and worse ------------------------------------------------------------------------------


def advertised(session, client, **changes):
    keys_of = {"cipher_private": bytes([client]) * 32, "mask_private": bytes([client + 100]) * 32} | changes
    cipher_key, mask_key = (keys.public_key(keys_of[name]) for name in ("cipher_private", "mask_private"))
    statement = b"edgetrain secure aggregation keys 1\0" + session.session + cipher_key + mask_key
    signature = session.keys[client].sign(statement + session.name(client).encode())
    return Advertise(cipher_key=cipher_key, mask_key=mask_key, signature=signature)


@pytest.mark.parametrize(
    "changes", [{"cipher_private": bytes([1]) * 32}, {"mask_private": bytes([101]) * 32},
                {"mask_private": bytes([1]) * 32}, {"cipher_private": bytes([102]) * 32}]
)  # fmt: skip
def test_equal_keys_are_refused_by_the_coordinator(changes):
    session = Session(4, settings_of(6))
    session.receive(1, advertised(session, 1))
    with pytest.raises(SecureAggregationError, match="equal"):
        session.receive(2, advertised(session, 2, **changes))


def test_equal_keys_are_refused_by_clients():
    session = session_after("advertise")
    roster = msgspec.msgpack.decode(session.server.roster, type=Roster)
    for field, copied in itertools.product(("identity", "cipher_key", "mask_key"), repeat=2):
        peers = list(roster.peers)
        peers[2] = msgspec.structs.replace(peers[2], **{field: getattr(peers[1], copied)})
        with pytest.raises(SecureAggregationError, match="equal keys"):
            members.share(session.members[0], changed_roster(session, peers=tuple(peers)), random=session.randoms[0])


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"])
def test_public_keys_of_small_order(point):
    session = Session(4, settings_of(6))
    good = advertised(session, 0)
    statement = b"edgetrain secure aggregation keys 1\0" + session.session + good.cipher_key + point
    signature = session.keys[0].sign(statement + session.name(0).encode())
    with pytest.raises(SecureAggregationError, match="gives no secret"):
        session.receive(0, Advertise(cipher_key=good.cipher_key, mask_key=point, signature=signature))


# --- replayed, reordered, forged, truncated --------------------------------------------------------------------------


def messages_of(session):
    """One client's messages of a whole session, by phase."""
    found = {}
    plain = session.receive

    def receive(client, message):
        if client == 1:
            found[type(message).__name__] = message
        plain(client, message)

    session.receive = receive
    session.run()
    return found


def test_messages_of_another_session_do_not_fit():
    """The same clients and keys, another nonce: nothing of the first session counts in the second."""
    old = messages_of(Session(4, settings_of(6)))
    assert set(old) == {"Advertise", "Shares", "Agreement", "Reveal"}
    new = Session(4, settings_of(6), nonce=b"m" * 16)
    with pytest.raises(SecureAggregationError, match="not signed for this session"):
        new.receive(1, old["Advertise"])
    new.advertise(range(4))
    with pytest.raises(SecureAggregationError, match="another roster"):
        new.receive(1, old["Shares"])
    new.share(range(4))
    new.mask(range(4))
    with pytest.raises(SecureAggregationError, match="signed other survivors"):
        new.receive(1, old["Agreement"])
    new.agree(range(4))
    # Shares of another session are of other secrets: the sum is found without them, or not at all.
    new.receive(1, old["Reveal"])
    new.reveal([0, 2, 3])
    new.sum = unmask(new.server, new.total)
    np.testing.assert_array_equal(new.unmasked(), new.plain_sum())


def test_messages_out_of_order_change_nothing():
    messages = messages_of(Session(4, settings_of(6)))
    order = ["Advertise", "Shares", "Agreement", "Reveal"]
    for done in range(len(order)):
        session = Session(4, settings_of(6))
        for phase in ("advertise", "share", "mask", "agree")[: done + (done > 1)]:
            getattr(session, phase)(range(4))
        before = session.server
        for name in order[done + 1 :]:
            with pytest.raises(SecureAggregationError):
                session.receive(1, messages[name])
            assert session.server is before
        with pytest.raises(SecureAggregationError):
            servers.note_masked(session.server, "client-0001" if done < 1 else "nobody")


def test_forged_messages():
    session = session_after("advertise")
    with pytest.raises(SecureAggregationError, match="not in the roster"):
        servers.receive(session.server, "stranger", bytes(32), Agreement(signature=bytes(64)))
    with pytest.raises(SecureAggregationError, match="too late"):
        session.receive(1, advertised(session, 1))
    session.share(range(4))
    session.mask(range(4))
    with pytest.raises(SecureAggregationError, match="signed other survivors"):
        session.receive(1, Agreement(signature=session.keys[2].sign(session.server.statement())))
    session.agree(range(4))
    with pytest.raises(SecureAggregationError, match="36 bytes where 4 times 36 were expected"):
        session.receive(1, Reveal(shares=b"\0" * SHARE_BYTES))


def test_boxes_that_are_forged_or_swapped_are_not_opened_and_the_sum_is_still_exact():
    session = session_after("share", size=5)
    boxes = servers.boxes_for(session.server, 0)
    spoiled = Boxes(
        present=boxes.present,
        boxes=boxes.boxes[BOX_BYTES : 2 * BOX_BYTES] + bytes(BOX_BYTES) + boxes.boxes[2 * BOX_BYTES :],
    )
    member, payload = members.mask(session.members[0], spoiled, session.vector(0))
    assert sorted(member.held) == [0, 3, 4], "of clients 1 and 2 it holds nothing"
    cast = session.server.cast
    session.total = unpack(payload, cast.layout).copy()
    session.members[0], session.payloads[0], session.integers[0] = member, payload, session.vector(0)
    session.server = servers.note_masked(session.server, session.name(0))
    for phase in ("mask", "agree", "reveal"):
        getattr(session, phase)(range(1, 5) if phase == "mask" else range(5))
    session.sum = unmask(session.server, session.total)
    np.testing.assert_array_equal(session.unmasked(), session.plain_sum())


@pytest.mark.parametrize("liar", range(5))
def test_a_client_that_reveals_wrong_shares(liar):
    """Four shares of five would do; a wrong one is noticed, and the others are enough."""
    session = session_after("agree", size=5)
    plain = session.receive

    def receive(client, message):
        if client == liar:
            message = Reveal(
                shares=bytes(byte ^ (place % SHARE_BYTES == 0) for place, byte in enumerate(message.shares))
            )
        plain(client, message)

    session.receive = receive
    session.reveal(range(5))
    session.sum = unmask(session.server, session.total)
    np.testing.assert_array_equal(session.unmasked(), session.plain_sum())


def test_wrong_shares_without_enough_right_ones_give_no_sum():
    session = session_after("agree", size=4)
    plain = session.receive
    session.receive = lambda client, message: plain(client, Reveal(shares=b"\1" * SHARE_BYTES * 4))
    session.reveal(range(4))
    with pytest.raises(SecureAggregationError, match="seed of client-0000 cannot be put together"):
        unmask(session.server, session.total)


@given(data=st.data())
def test_truncated_and_random_bytes_are_one_error(data):
    good = encode(Shares(roster=bytes(32), commitment=bytes(32), boxes=bytes(3 * BOX_BYTES)))
    bad = data.draw(st.one_of(st.binary(max_size=300), st.integers(0, len(good) - 1).map(lambda end: good[:end])))
    for decode in (decode_from_member, decode_from_server, decode_settings):
        with pytest.raises(SecureAggregationError):
            decode(bad)
    with pytest.raises(SecureAggregationError):
        open_roster(bad, bytes(32), encode(settings_of(3)))


def test_every_truncation_of_a_message():
    for message in messages_of(Session(3, settings_of(2))).values():
        whole = encode(message)
        assert decode_from_member(whole) == message
        for end in range(len(whole)):
            with pytest.raises(SecureAggregationError):
                decode_from_member(whole[:end])

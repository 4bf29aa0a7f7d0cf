"""Whole sessions: whoever drops out wherever, the result is the exact sum of the survivors or nothing."""

from __future__ import annotations

import copy
import itertools
import math

import msgspec
import numpy as np
import pytest

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation import member as members
from edgetrain.protocol.secure_aggregation import server as servers
from edgetrain.protocol.secure_aggregation.arithmetic import Quantizer
from edgetrain.protocol.secure_aggregation.member import Member
from edgetrain.protocol.secure_aggregation.messages import Reveal, encode
from edgetrain.protocol.secure_aggregation.server import Server
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES
from edgetrain.protocol.secure_aggregation.unmasking import unmask
from support.secure_session import Session, settings_of

PHASES = ("advertise", "share", "mask", "agree", "reveal")


def check_exact(session):
    np.testing.assert_array_equal(session.unmasked(), session.plain_sum())


def check_one_kind_only(session):
    """Nobody was given both kinds of share of a client: of the seed of survivors, of the mask key of the rest."""
    for member in session.members.values():
        if member.phase == "revealed":
            reveal = msgspec.msgpack.decode(member.reply, type=Reveal)
            present = [holder for holder in member.cast.graph.holders(member.cast.positions[member.name])
                       if holder in member.present]  # fmt: skip
            assert len(reveal.shares) == SHARE_BYTES * len(present)
            assert member.held == {}


def branch(session):
    """A copy that can go another way; all that is in it are values."""
    other = copy.copy(session)
    other.members, other.integers = dict(session.members), dict(session.integers)
    other.payloads, other.uplink = dict(session.payloads), dict(session.uplink)
    other.total = None if session.total is None else session.total.copy()
    return other


def explore(session, depth, there, seen):
    """Every way to go on from here: before each phase any subset of those who are there may leave."""
    if depth == len(PHASES):
        assert session.total is not None
        session.sum = unmask(session.server, session.total)
        check_exact(session)
        check_one_kind_only(session)
        seen["summed"] += 1
        return
    for size in range(len(there) + 1):
        for stay in itertools.combinations(there, size):
            other = branch(session)
            try:
                getattr(other, PHASES[depth])(stay)
            except SecureAggregationError:
                # Independently of the code: too few have answered.
                threshold = other.server.cast.roster.threshold if other.server.roster else 0
                assert size < max(threshold, 2)
                assert other.server.phase != "done"
                seen["given up"] += 1
                continue
            threshold = other.server.cast.roster.threshold
            assert size >= (threshold if depth else 2)
            explore(other, depth + 1, stay, seen)


def expected(there, threshold=0, depth=0):
    """(sums, sessions given up) among all ways to drop out, by counting subsets: every phase needs a majority of
    those who advertised, and of those two."""
    if depth == len(PHASES):
        return 1, 0
    sums, given_up = 0, 0
    for size in range(there + 1):
        ways = math.comb(there, size)
        if size < (threshold or 2):
            given_up += ways
            continue
        further = expected(size, threshold or size // 2 + 1, depth + 1)
        sums, given_up = sums + ways * further[0], given_up + ways * further[1]
    return sums, given_up


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_way_to_drop_out(size):
    """Each of up to five clients may leave before any of the five phases, or stay: all of it."""
    seen = {"summed": 0, "given up": 0}
    explore(Session(size, settings_of(6)), 0, tuple(range(size)), seen)
    assert (seen["summed"], seen["given up"]) == expected(size)


@pytest.mark.parametrize("phase", PHASES)
def test_any_two_of_five_drop_out_at_a_phase(phase):
    for pair in itertools.combinations(range(5), 2):
        session = Session(5, settings_of(4)).run({phase: set(pair)})
        assert not session.given_up
        check_exact(session)


@pytest.mark.parametrize("seed", range(1))
def test_a_hundred_clients_drop_out_at_random(seed):
    generator = np.random.default_rng(seed)
    session = Session(100, settings_of(50, colluding=0.0, minimum=20), seed=seed, neighbours=40)
    gone = {phase: set(generator.choice(100, 6, replace=False).tolist()) for phase in PHASES}
    session.run(gone)
    assert not session.given_up, session.given_up
    assert 60 < len(session.survivors) <= 88
    check_exact(session)
    check_one_kind_only(session)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_hundreds_of_clients_drop_out_at_random(seed):
    generator = np.random.default_rng(100 + seed)
    session = Session(100, settings_of(20, colluding=0.05, minimum=20), seed=seed, dropout=0.35)
    gone = {phase: set(generator.choice(100, int(generator.integers(0, 9)), replace=False).tolist())
            for phase in PHASES}  # fmt: skip
    session.run(gone)
    assert not session.given_up, session.given_up
    check_exact(session)


def test_too_few_survivors_reveal_nothing():
    session = Session(6, settings_of(5, minimum=5)).run({"mask": {0, 1}})
    assert session.given_up.startswith("4 clients sent a masked vector, 5 are needed")
    assert session.sum is None
    assert not session.server.reveals
    assert not session.server.agreements


def test_the_same_seed_gives_the_same_bytes():
    first, second = (Session(4, settings_of(9), seed="s").run() for _ in range(2))
    assert first.payloads == second.payloads
    assert Session(4, settings_of(9), seed="t").run().payloads != first.payloads


@pytest.mark.parametrize("bits", ["int8", "noise of 2^20", "noise of 2^40"])
def test_all_word_sizes(bits):
    bound = {"int8": 0, "noise of 2^20": 2**20, "noise of 2^40": 2**40}[bits]
    quantizer = Quantizer(range=1.0, noise_bound=bound)

    def vectors(client, layout):
        return np.random.default_rng(client).integers(-127 - bound, 128 + bound, layout.length)

    session = Session(4, settings_of(30, quantizer=quantizer), vectors=vectors).run({"mask": {2}})
    check_exact(session)
    assert session.total is not None
    assert session.total.dtype.itemsize == {0: 2, 2**20: 4, 2**40: 8}[bound]


def test_both_sides_are_values_that_go_on_from_disk():
    """Before and after every single step, everything goes through bytes and back."""
    session = Session(4, settings_of(8))

    class Amnesia(dict):
        def __setitem__(self, client, member):
            super().__setitem__(client, msgspec.msgpack.decode(msgspec.msgpack.encode(member), type=Member))

    session.members = Amnesia()
    plain_receive = session.receive

    def receive(client, message):
        plain_receive(client, message)
        session.server = msgspec.msgpack.decode(msgspec.msgpack.encode(session.server), type=Server)

    session.receive = receive
    session.run({"mask": {3}})
    assert not session.given_up
    check_exact(session)


def test_a_step_that_is_repeated_gives_the_same_answer():
    session = Session(4, settings_of(8))
    session.advertise(range(4))
    roster = session.server.roster
    first = members.share(session.members[0], roster, random=session.randoms[0])
    assert members.share(first[0], roster, random=session.randoms[0]) == first
    session.share(range(4))
    session.mask(range(4))
    message = servers.survivors_message(session.server)
    agreed = members.agree(session.members[0], message, sign=session.keys[0].sign)
    assert members.agree(agreed[0], message, sign=session.keys[0].sign) == agreed
    session.agree(range(4))
    revealed = members.reveal(session.members[0], servers.agreements_for(session.server, 0))
    assert members.reveal(revealed[0], servers.agreements_for(session.server, 0)) == revealed
    before = session.server
    session.receive(0, revealed[1])
    after = session.server
    session.receive(0, revealed[1])
    assert session.server is after is not before
    assert encode(revealed[1]) == revealed[0].reply

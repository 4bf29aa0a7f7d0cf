"""Signatures that are made and checked beside the coordinator's own work."""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest

from edgetrain.coordinator import signatures
from edgetrain.coordinator.clients.roster import ClientRecord, Roster
from edgetrain.coordinator.signatures import Signatures
from edgetrain.coordinator.signing import MANY, Signing
from edgetrain.coordinator.signing_process import Seal
from edgetrain.protocol import SignatureError
from edgetrain.protocol.messages import Goodbye, encode_message
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal, unseal, verify
from edgetrain.protocol.transport import Connected, Received

TOPICS = Topics("home")
KEYS = {name: SigningKey(name.encode() * 32) for name in "abcdefghij"}


KEY = SigningKey(bytes(range(32)))
BODIES = [f"body {number}".encode() for number in range(40)]


def message(client, reason="bye"):
    return seal(KEYS[client], "home", client, encode_message(Goodbye(reason=reason, connection=bytes(16))))


def forged(client):
    """Signed by somebody else."""
    return seal(SigningKey(bytes(32)), "home", client, encode_message(Goodbye(reason="", connection=bytes(16))))


def ready(signing):
    """When its process has started."""
    deadline = time.monotonic() + 60.0
    while not signing.helper_pid or not signing._helper.ask(Seal([])):
        signing.seal(BODIES)()
        assert time.monotonic() < deadline, "it does not start"
    return signing.helper_pid


@pytest.fixture
def alone():
    return Signing("home", "coordinator", KEY, beside=False)


@pytest.fixture
def helped():
    signing = Signing("home", "coordinator", KEY, beside=True)
    yield signing
    signing.close()


# --- the process -------------------------------------------------------------------------------------


def test_the_process_signs_and_checks_what_would_be_signed_and_checked_here(alone, helped):
    ready(helped)
    assert helped.seal(BODIES)() == alone.seal(BODIES)()
    jobs = [(KEYS[name].public_key, forged(name) if name in "bf" else message(name)) for name in KEYS]
    jobs += [(KEYS["a"].public_key, b"\xc1junk"), (b"no key", message("a")), (KEYS["b"].public_key, message("a"))]
    assert helped.check(jobs)() == alone.check(jobs)() == [name not in "bf" for name in KEYS] + [False] * 3


def test_what_it_signs_is_the_coordinators(helped):
    ready(helped)
    for body, envelope in zip(BODIES, helped.seal(BODIES)(), strict=True):
        verify(unseal(envelope), "home", KEY.public_key)
        assert (unseal(envelope).body, unseal(envelope).sender) == (body, "coordinator")


def test_answers_may_be_fetched_in_any_order(alone, helped):
    ready(helped)
    waits = [helped.seal(BODIES[start : start + 5]) for start in range(0, 40, 5)]
    found = {number: waits[number]() for number in (3, 0, 7, 1, 2, 6, 5, 4)}
    assert [envelope for number in range(8) for envelope in found[number]] == alone.seal(BODIES)()


def test_a_large_request_and_a_large_answer(alone, helped):
    """More than a pipe holds, in both directions."""
    ready(helped)
    bodies = [bytes([number]) * 60_000 for number in range(40)]
    assert helped.seal(bodies)() == alone.seal(bodies)()


def test_a_large_request_while_a_large_answer_waits_to_be_read(alone, helped):
    """Neither side waits for the other for ever."""
    ready(helped)
    bodies = [bytes([number]) * 60_000 for number in range(40)]
    jobs = [(KEYS["a"].public_key, seal(KEYS["a"], "home", "a", bytes(50_000)))] * 40
    sealed, first, second = helped.seal(bodies), helped.check(jobs), helped.check(jobs)
    assert first() == second() == [True] * 40
    assert sealed() == alone.seal(bodies)()
    assert helped.helper_pid is not None


def test_who_is_behind_is_not_given_more_to_sign(alone, helped):
    pid = ready(helped)
    os.kill(pid, signal.SIGSTOP)
    try:
        jobs = [(KEYS["a"].public_key, message("a"))] * 4
        looks = [helped.check(jobs), helped.check(jobs)]
        assert helped.seal(BODIES)() == alone.seal(BODIES)()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [look() for look in looks] == [[True] * 4] * 2
    assert helped.helper_pid == pid


def test_few_signatures_start_no_process(helped):
    assert helped.seal(BODIES[: MANY - 1])()
    assert helped.check([(KEYS["a"].public_key, message("a"))])() == [True]
    assert helped.helper_pid is None


def test_where_none_may_help_none_is_started(alone):
    assert alone.seal(BODIES)()
    assert alone.helper_pid is None


def test_a_process_that_dies_costs_nothing(alone, helped, caplog):
    pid = ready(helped)
    before = helped.seal(BODIES)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)], timeout=30.0)
    after = helped.seal(BODIES)
    assert before() == after() == helped.seal(BODIES)() == alone.seal(BODIES)()
    assert helped.helper_pid is None
    assert "going on without it" in caplog.text


def test_a_process_that_cannot_be_started_costs_nothing(alone, helped, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert helped.seal(BODIES)() == alone.seal(BODIES)()
    assert "going on without it" in caplog.text


def test_it_ends_with_the_coordinator(helped):
    pid = ready(helped)
    helped.close()
    assert not psutil.pid_exists(pid)
    helped.close()


def test_it_ends_when_nobody_asks_any_more(helped):
    """As after a kill -9 of the coordinator: its input ends."""
    pid = ready(helped)
    helped._helper._requests.close()
    gone, _ = psutil.wait_procs([psutil.Process(pid)], timeout=30.0)
    assert gone


def test_its_key_is_not_on_its_command_line(helped):
    process = psutil.Process(ready(helped))
    seen = " ".join([*process.cmdline(), *map("=".join, process.environ().items())])
    assert KEY.secret() not in seen


# --- signatures --------------------------------------------------------------------------------------


def arrived(client, payload, kind="message"):
    return Received(TOPICS.from_client(client, kind), payload)


@pytest.fixture
def checked(alone, monkeypatch):
    """(signatures that know a to i, what looks at events, senders whose signatures were checked one by one)."""
    roster = Roster(lambda: 0.0)
    for name, key in KEYS.items():
        if name != "j":
            roster.add(ClientRecord(name, key.public_key))
    roster["i"].banned_until = 10.0
    singly = []

    def checked_singly(envelope, federation, public_key):
        singly.append(envelope.sender)
        verify(envelope, federation, public_key)

    monkeypatch.setattr(signatures, "verify", checked_singly)
    checks = Signatures(TOPICS, roster, alone, lambda: 0.0)
    return checks, lambda events: checks.rely_on(checks.look_ahead(events)), singly


def test_what_was_looked_at_ahead_is_not_checked_again(checked):
    checks, look, singly = checked
    payloads = {name: message(name) for name in "abcdefghij"}
    look([Connected(), *(arrived(name, payload) for name, payload in payloads.items())])
    for name, payload in payloads.items():
        checks.check(unseal(payload), payload, KEYS[name].public_key)
    # One who is banned and one who is not known.
    assert singly == ["i", "j"]


def test_a_forged_message_is_refused_whatever_is_around_it(checked):
    checks, look, _ = checked
    payloads = [forged(name) if name in "cf" else message(name) for name in "abcdefgh"]
    junk = [
        arrived("a", b"\xc1junk"),
        arrived("b", b""),
        Received("elsewhere/message", b"x"),
        arrived("c", b"", "blob"),
    ]
    look(junk + [arrived(name, payload) for name, payload in zip("abcdefgh", payloads, strict=True)])
    refused = []
    for name, payload in zip("abcdefgh", payloads, strict=True):
        try:
            checks.check(unseal(payload), payload, KEYS[name].public_key)
        except SignatureError:
            refused.append(name)
    assert refused == ["c", "f"]


def test_a_signature_is_right_for_its_own_key_only(checked):
    checks, look, _ = checked
    payload = message("a")
    look([arrived("a", payload)] * 8)
    checks.check(unseal(payload), payload, KEYS["a"].public_key)
    with pytest.raises(SignatureError):
        # As if the name had got another key since.
        checks.check(unseal(payload), payload, KEYS["b"].public_key)


def test_two_looks_may_be_open_at_a_time(checked):
    checks, _, singly = checked
    first, second = message("a"), message("b")
    looks = [checks.look_ahead([arrived("a", first)]), checks.look_ahead([arrived("b", second)])]
    for look, (name, payload) in zip(looks, (("a", first), ("b", second)), strict=True):
        checks.rely_on(look)
        checks.check(unseal(payload), payload, KEYS[name].public_key)
    assert singly == []


def test_the_next_look_forgets_the_last(checked):
    checks, look, singly = checked
    payload = message("a")
    look([arrived("a", payload)])
    look([arrived("b", message("b"))])
    checks.check(unseal(payload), payload, KEYS["a"].public_key)
    assert singly == ["a"]

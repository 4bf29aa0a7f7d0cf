"""Calls side by side, and signatures that are checked so before their messages are handled."""

from __future__ import annotations

import threading

import pytest

from edgetrain.coordinator import signatures
from edgetrain.coordinator.clients.roster import ClientRecord, Roster
from edgetrain.coordinator.side_by_side import SideBySide
from edgetrain.coordinator.signatures import Signatures
from edgetrain.protocol import SignatureError
from edgetrain.protocol.messages import Goodbye, encode_message
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal, unseal
from edgetrain.protocol.transport import Connected, Received

TOPICS = Topics("home")
KEYS = {name: SigningKey(name.encode() * 32) for name in "abcdefghij"}


@pytest.fixture
def two():
    side_by_side = SideBySide(2)
    yield side_by_side
    side_by_side.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_results_come_in_the_order_of_the_items(threads, count):
    side_by_side = SideBySide(threads)
    assert side_by_side.map(lambda item: item * item, range(count)) == [item * item for item in range(count)]
    side_by_side.close()


def test_calls_overlap(two):
    # Each waits until another one has come: one after the other, the first would wait for ever.
    meeting = threading.Barrier(2)
    two.map(lambda _item: meeting.wait(30.0), range(8))


def test_one_thread_is_the_one_that_asks():
    assert set(SideBySide(1).map(lambda _item: threading.current_thread(), range(100))) == {threading.current_thread()}


def test_what_a_call_raises_is_raised_and_the_next_ones_work(two):
    def call(item):
        if item == 5:
            raise ValueError("five")
        return item

    for _ in range(20):
        with pytest.raises(ValueError, match="five"):
            two.map(call, range(16))
    assert two.map(call, range(6, 30)) == list(range(6, 30))


# --- signatures --------------------------------------------------------------------------------------


def message(client, reason="bye"):
    return seal(KEYS[client], "home", client, encode_message(Goodbye(reason=reason, connection=bytes(16))))


def forged(client):
    """Signed by somebody else."""
    return seal(SigningKey(bytes(32)), "home", client, encode_message(Goodbye(reason="", connection=bytes(16))))


def arrived(client, payload, kind="message"):
    return Received(TOPICS.from_client(client, kind), payload)


@pytest.fixture
def checked(two, monkeypatch):
    """(signatures that know a to i but not j, the senders whose signatures were checked one by one)."""
    roster = Roster(lambda: 0.0)
    for name, key in KEYS.items():
        if name != "j":
            roster.add(ClientRecord(name, key.public_key))
    roster["i"].banned_until = 10.0
    singly = []

    def verify(envelope, federation, public_key, real=signatures.verify):
        if threading.current_thread() is threading.main_thread() and not ahead.is_set():
            singly.append(envelope.sender)
        real(envelope, federation, public_key)

    ahead = threading.Event()
    monkeypatch.setattr(signatures, "verify", verify)
    checks = Signatures(TOPICS, roster, two, lambda: 0.0)

    def look(events):
        ahead.set()
        checks.look_ahead(events)
        ahead.clear()

    return checks, look, singly


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


def test_the_next_look_forgets_the_last(checked):
    checks, look, singly = checked
    payload = message("a")
    look([arrived("a", payload)])
    look([arrived("b", message("b"))])
    checks.check(unseal(payload), payload, KEYS["a"].public_key)
    assert singly == ["a"]

"""What is refused is counted, told with its reason, written down, and done too often it gets one banned."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from edgetrain.coordinator import events
from edgetrain.coordinator.audit import verify_audit
from edgetrain.coordinator.audit.verify import records_of
from edgetrain.coordinator.authority.registry import Enrolment, write_registry
from edgetrain.coordinator.config import BansConfig, LimitsConfig
from edgetrain.protocol import encode
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.messages import Ready, encode_message
from edgetrain.protocol.signing import MAX_MESSAGE_BYTES, SigningKey
from support.scripted import ScriptedClient, ScriptedFederation

ROUNDS = {"total": 3, "goal": 3, "minimum": 2, "deadline_seconds": 30.0, "gather_seconds": 5.0}


@pytest.fixture
def federate(tiny_bundle, ram_path):
    def make(**settings):
        return ScriptedFederation(tiny_bundle, ram_path / "run", **({"rounds": ROUNDS} | settings))

    return make


def audit(federation, **wanted):
    """Records of the audit log with these fields; the log is whole."""
    verify_audit(federation.out)
    records = records_of(federation.out)
    return [record for record in records if all(record.get(key) == value for key, value in wanted.items())]


def kinds(federation, client):
    return [event.kind for event in federation.seen if isinstance(event, events.Refused) and event.client == client]


class Misbehaving(ScriptedClient):
    """Does something at every plan, besides taking part honestly."""

    def disturb(self, plan):
        raise NotImplementedError

    def on_plan(self, plan):
        self.disturb(plan)
        super().on_plan(plan)


def dense(federation_client, plan):
    return encode(np.full(federation_client.num_parameters(plan), 5, np.float32), "dense|float32")


def malformed(client, _plan):
    client.send_raw(b"\xc1junk")


def oversize(client, _plan):
    client.send_raw(bytes(MAX_MESSAGE_BYTES + 1))


def huge_chunk(client, plan):
    update = dense(client, plan)
    client.send(client.offer(plan, update))
    client.send_raw(bytes((1 << 20) + 1), "blob")


def forged(client, plan):
    client.send_raw(client.sealed(client.offer(plan, dense(client, plan)), key=SigningKey(bytes(32))))


def foreign_id(client, plan):
    client.send_raw(client.sealed(client.offer(plan, dense(client, plan)), sender="a"))


def of_another_run(client, plan):
    client.send(client.offer(plan, dense(client, plan), run=bytes(16)))


def with_another_nonce(client, plan):
    client.send(client.offer(plan, dense(client, plan), nonce=bytes(16)))


def stale_round(client, plan):
    client.send(client.offer(plan, dense(client, plan), round=2**30))


def replayed_hello(client, _plan):
    client.send(client.hello(connection=b"0" * 16))
    client.send(client.hello())
    client.send(client.hello(connection=b"0" * 16))


def replayed_ready(client, _plan):
    client.send(Ready(bundle=client.bundle, runtime="onnxruntime", num_examples=9, connection=b"1" * 16))


@pytest.mark.parametrize(
    ("disturb", "kind"),
    [
        (malformed, "malformed"),
        (oversize, "oversize"),
        (huge_chunk, "oversize"),
        (forged, "forged"),
        (foreign_id, "foreign_id"),
        (of_another_run, "replay"),
        (with_another_nonce, "replay"),
        (stale_round, "stale_round"),
        (replayed_hello, "replay"),
        (replayed_ready, "replay"),
    ],
)
def test_a_refusal_is_counted_told_and_written_down_with_its_reason(federate, disturb, kind):
    federation = federate(rounds=ROUNDS | {"total": 1})
    for name in ("a", "b"):
        federation.add(name)
    federation.add("z", type("Z", (Misbehaving,), {"disturb": disturb}))
    summary = federation.serve()
    assert summary.status == "completed"
    assert kind in kinds(federation, "z")
    assert not kinds(federation, "a")
    written = [record for record in audit(federation, client="z") if record["type"].startswith("refused")]
    assert kind in [record["kind"] for record in written]
    reasons = [reason for client, reason in federation.refused() if client == "z"]
    assert [record["reason"] for record in written] == reasons
    assert {record["client"] for record in audit(federation, type="accepted")} >= {"a", "b"}


def test_a_second_update_is_refused_with_its_digest_and_reason(federate):
    class Twice(ScriptedClient):
        def on_plan(self, plan):
            super().on_plan(plan)
            self.send(self.offer(plan, dense(self, plan)))

    federation = federate(rounds=ROUNDS | {"total": 1})
    client = federation.add("z", Twice)
    for name in ("a", "b"):
        federation.add(name)
    federation.serve()
    [refused] = audit(federation, type="refused_update")
    plan = client.plans[0]
    assert refused["digest"] == blob_ref(dense(client, plan)).digest.hex()
    assert (refused["client"], refused["round"], refused["kind"]) == ("z", 1, "replay")
    assert refused["reason"] == "an update of this client is already in the round"
    [accepted] = audit(federation, type="accepted", client="z")
    assert accepted["digest"] == blob_ref(encode(client.delta(plan), plan.codec)).digest.hex()


@pytest.mark.parametrize("field", ["run", "round", "nonce", "update", "num_examples"])
def test_everything_that_an_offer_says_is_signed(federate, field):
    """z signs one offer and sends another: no field of it can be changed on the way."""
    changes = {"run": b"r" * 16, "round": 7, "nonce": b"n" * 16, "num_examples": 99, "update": blob_ref(b"another")}

    class Tampered(ScriptedClient):
        def on_plan(self, plan):
            offer = self.offer(plan, dense(self, plan))
            envelope = msgspec.msgpack.decode(self.sealed(offer))
            envelope[2] = encode_message(msgspec.structs.replace(offer, **{field: changes[field]}))
            self.send_raw(msgspec.msgpack.encode(envelope))

    federation = federate(rounds=ROUNDS | {"total": 1})
    for name in ("a", "b"):
        federation.add(name)
    federation.add("z", Tampered)
    federation.serve()
    assert kinds(federation, "z") == ["forged"]
    assert not audit(federation, type="accepted", client="z")


# --- bans --------------------------------------------------------------------------------------------


class Offender(ScriptedClient):
    """Five signed offences at every plan."""

    def on_plan(self, plan):
        for number in range(5):
            self.send(self.offer(plan, dense(self, plan), nonce=number.to_bytes(16, "little")))
        super().on_plan(plan)


def test_a_repeated_offender_is_banned_and_comes_back(federate):
    limits = LimitsConfig(bans=BansConfig(after=5, window_seconds=60.0, seconds=100.0))
    federation = federate(limits=limits, rounds=ROUNDS | {"total": 14, "deadline_seconds": 40.0})
    for name in ("a", "b"):
        federation.add(name)
    offender = federation.add("z", Offender)
    started = federation.clock.now

    def observe(event):
        if isinstance(event, events.RoundEnded):
            federation.clock.now += 20.0

    federation.serve(observe)
    assert federation.clock.now - started >= 280
    banned = audit(federation, type="banned")
    assert [record["client"] for record in banned] == ["z"] * len(banned)
    assert [record["seconds"] for record in banned][:2] == [100.0, 200.0]
    invited = [record["round"] for record in audit(federation, type="invited", client="z")]
    assert invited[0] == 1
    assert invited[1] > 3, "not while it was banned"
    assert not audit(federation, type="accepted", client="z")
    assert all(record["accepted"] == 2 for record in federation.records())
    assert len(offender.plans) == len(invited)


def test_nobody_is_banned_for_what_others_do_in_its_name(federate):
    """Without enrolments anybody may write anywhere: what bears no signature of a's is held against nobody."""

    class Slanderer(ScriptedClient):
        def on_plan(self, plan):
            for _ in range(50):
                topic = self.topics.from_client("a", "message")
                self.transport.publish(topic, b"junk")
                self.transport.publish(topic, self.sealed(self.offer(plan, b"x"), sender="a"))
            super().on_plan(plan)

    federation = federate(limits=LimitsConfig(bans=BansConfig(after=2)), rounds=ROUNDS)
    for name in ("a", "b"):
        federation.add(name)
    federation.add("z", Slanderer)
    federation.serve()
    assert not audit(federation, type="banned")
    assert len(audit(federation, type="accepted", client="a")) == 3
    # The log does not grow with the noise.
    about_a = [record for record in audit(federation, client="a") if record["type"] == "refused_message"]
    assert len(kinds(federation, "a")) == 300
    assert len(about_a) <= 90


# --- enrolments --------------------------------------------------------------------------------------


def enrolment(client, **changes):
    entry = Enrolment(
        name=client.name, public_key=client.key.public_key.hex(), serial="1", enrolled_at="2026-01-01T00:00:00Z"
    )
    return msgspec.structs.replace(entry, **changes)


def test_only_who_is_enrolled_with_this_key_takes_part(federate, ram_path):
    federation = federate(enrolments=str(ram_path / "fed"), rounds=ROUNDS | {"goal": 2})
    (ram_path / "fed").mkdir()
    a, b, stranger, other_key, revoked = (federation.add(name) for name in ("a", "b", "s", "o", "r"))
    entries = [
        enrolment(a),
        enrolment(b),
        enrolment(other_key, public_key="00" * 32),
        enrolment(revoked, revoked_at="2026-02-02T00:00:00Z"),
    ]
    write_registry(ram_path / "fed", entries)
    assert federation.serve().status == "completed"
    assert {record["client"] for record in audit(federation, type="accepted")} == {"a", "b"}
    for client, kind, text in (
        (stranger, "not_enrolled", "edgetrain enroll s"),
        (other_key, "not_enrolled", "enrolled with another key"),
        (revoked, "revoked", "was revoked on 2026-02-02"),
    ):
        assert set(kinds(federation, client.name)) == {kind}
        assert text in client.refusals[0].reason
        assert not client.plans
    assert {record["client"] for record in audit(federation, type="enrolled", by="authority")} == {"a", "b", "o"}
    assert [record["client"] for record in audit(federation, type="revoked")] == ["r"]


def test_a_client_that_is_revoked_meanwhile_is_sent_away_and_renewed_keys_count(federate, ram_path):
    federation = federate(enrolments=str(ram_path / "fed"), rounds=ROUNDS | {"total": 8, "minimum": 1})
    (ram_path / "fed").mkdir()
    a, b, c = (federation.add(name) for name in ("a", "b", "c"))
    entries = {client.name: enrolment(client) for client in (a, b, c)}
    write_registry(ram_path / "fed", list(entries.values()))

    def observe(event):
        if isinstance(event, events.RoundEnded) and event.record.round == 2:
            c.key = SigningKey(b"renewed".ljust(32))
            entries["b"] = enrolment(b, revoked_at="2026-03-03T00:00:00Z")
            entries["c"] = enrolment(c, earlier_serials=("1",))
            write_registry(ram_path / "fed", list(entries.values()))
            c.send(c.hello(connection=b"n" * 16))
            c.say_ready()

    federation.serve(observe)
    accepted = [(record["client"], record["round"]) for record in audit(federation, type="accepted")]
    assert {number for name, number in accepted if name == "b"} == {1, 2}
    assert max(number for name, number in accepted if name == "c") == 8
    assert "was revoked on 2026-03-03" in b.refusals[0].reason
    assert len(audit(federation, type="enrolled", client="c")) == 2


def test_settings_that_name_no_federation_directory(federate, ram_path):
    federation = federate(enrolments=str(ram_path / "nowhere"))
    with pytest.raises(Exception, match="edgetrain init"):
        federation.serve()


def test_no_update_and_no_data_is_in_the_log(federate):
    """Whatever the clients send, the log holds digests of it only."""
    federation = federate()
    clients = [federation.add(name) for name in ("a", "b", "c")]
    federation.serve()
    text = (federation.out / "audit.jsonl").read_bytes()
    for client in clients:
        update = encode(client.delta(client.plans[0]), "dense|float32")
        digest = blob_ref(update).digest.hex()
        assert digest.encode() in text
        for start in range(0, len(update) - 8, 8):
            assert update[start : start + 8] not in text
            assert update[start : start + 8].hex().encode() not in text
    assert all(len(line) < 1000 for line in text.splitlines())
    assert json.loads(text.splitlines()[0])["type"] == "opened"

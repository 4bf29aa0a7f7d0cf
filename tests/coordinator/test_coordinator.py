"""The coordinator with honest and other clients: what it accepts, refuses, and never counts."""

from __future__ import annotations

import csv
import os
import re

import msgspec
import numpy as np
import pytest

from edgetrain.coordinator import events
from edgetrain.coordinator.audit.verify import records_of
from edgetrain.coordinator.config import EvaluationConfig, LimitsConfig, StopConfig
from edgetrain.coordinator.errors import RoundFailed
from edgetrain.coordinator.evaluation import Evaluation
from edgetrain.coordinator.parameters import decode_parameters
from edgetrain.protocol import CodecError, ConfigError, encode
from edgetrain.protocol.blobs import HEADER_BYTES, blob_ref, cut
from edgetrain.protocol.messages import BlobRef, Decline, Offer, Ready, Report, Want
from edgetrain.protocol.signing import SigningKey, seal
from edgetrain.protocol.vectors import vector_digest
from support.scripted import FEDERATION, ScriptedClient, ScriptedFederation
from support.tiny_bundle import NUM_PARAMETERS, initial_parameters


@pytest.fixture
def federate(tiny_bundle, ram_path):
    def make(**settings):
        return ScriptedFederation(tiny_bundle, ram_path / "run", **settings)

    return make


def expected_parameters(names, rounds, num_examples=10):
    """FedAvg in Python's integers, from the same made-up deltas."""
    parameters = initial_parameters()
    for number in range(1, rounds + 1):
        total = [0] * NUM_PARAMETERS
        for name in names:
            rng = np.random.default_rng([number, *name.encode()])
            for index, value in enumerate(rng.normal(0, 0.1, NUM_PARAMETERS).astype(np.float32)):
                total[index] += round(float(value) * num_examples * 2**30)
        mean = np.array([value / (len(names) * num_examples * 2**30) for value in total])
        parameters = (parameters + mean).astype(np.float32)
    return parameters


def final_parameters(federation):
    data = (federation.out / "parameters.safetensors").read_bytes()
    return decode_parameters(data, federation.bundle.manifest)


def test_honest_clients_give_the_mean_to_the_bit(federate):
    federation = federate()
    clients = [federation.add(name) for name in ("a", "b")]
    summary = federation.serve()
    assert (summary.status, summary.rounds, summary.clients) == ("completed", 3, 2)
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 3))
    for client in clients:
        assert [verdict.accepted for verdict in client.verdicts] == [True] * 3
    dense = 4 * NUM_PARAMETERS
    for number, record in enumerate(federation.records(), 1):
        assert (record["round"], record["accepted"], record["num_examples"]) == (number, 2, 20)
        assert record["bytes_up_float32"] == 2 * dense
        assert dense * 2 < record["update_bytes"] < dense * 2 + 100
    assert federation.records()[-1]["parameters_sha256"] == vector_digest(final_parameters(federation)).hex()
    rows = list(csv.DictReader((federation.out / "clients.csv").read_text().splitlines()))
    assert [(row["round"], row["client"]) for row in rows] == [(n, c) for n in "123" for c in "ab"]
    assert msgspec.json.decode((federation.out / "summary.json").read_bytes())["status"] == "completed"


def test_the_weights_are_the_numbers_of_examples(federate):
    federation = federate(rounds={"total": 1})

    class One(ScriptedClient):
        def delta(self, plan):
            return np.full(NUM_PARAMETERS, 1 if self.name == "a" else -3, np.float32)

    federation.add("a", One, num_examples=30)
    federation.add("b", One, num_examples=10)
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), initial_parameters())  # 30 * 1 + 10 * -3 = 0


# --- hostile and confused clients --------------------------------------------------------------------
#
# In each case the run must end with what the honest two give, and they must notice nothing.


class Disturber(ScriptedClient):
    """Invited like everyone, but does not answer as it should."""

    disturbance = staticmethod(lambda client, plan: None)

    def on_plan(self, plan):
        if plan.nonce not in self.answered:
            self.answered.add(plan.nonce)
            self.disturbance(self, plan)


def offer_bytes(payload, **changes):
    """A disturbance: offers these bytes."""

    def disturb(client, plan):
        data = payload
        offer = client.offer(plan, data, **changes)
        client.pending = (offer, data)
        client.send(offer)
        client.send_chunks(blob_ref(data), data)

    return disturb


def dense(value, length=NUM_PARAMETERS):
    """An encoded update written by hand: dense float32, any values."""
    good = encode(np.ones(length, np.float32), "dense|float32")
    body = np.full(length, value, "<f4").tobytes()
    return good[: -len(body)] + body


def truncated(client, plan):
    data = dense(0.5)
    offer = client.offer(plan, data)
    client.send(offer)
    for chunk in cut(offer.update, data, [(0, 100)]):
        client.send_raw(chunk, "blob")


def forged(client, plan):
    offer = client.offer(plan, dense(5))
    client.send_raw(client.sealed(offer, key=SigningKey(bytes(32))))
    client.send_chunks(offer.update, dense(5))


def in_the_name_of(victim):
    def disturb(client, plan):
        offer = client.offer(plan, dense(5))
        topic = client.topics.from_client(victim, "message")
        blob_topic = client.topics.from_client(victim, "blob")
        for payload in (
            client.sealed(offer),  # its own name on another's topic
            client.sealed(offer, sender=victim),  # another's name, its own key
            seal(client.key, "another-federation", victim, b""),
        ):
            client.transport.publish(topic, payload)
        for chunk in cut(offer.update, dense(5)):
            client.transport.publish(blob_topic, chunk)

    return disturb


def wrong_chunks(client, plan):
    """Chunks under the digest of what was offered, with other bytes."""
    data = dense(0.5)
    offer = client.offer(plan, data)
    client.send(offer)
    other = dense(0.75)
    for chunk in cut(offer.update, other):
        client.send_raw(chunk, "blob")


def two_updates(client, plan):
    for value in (0.5, 0.75):
        offer = client.offer(plan, dense(value))
        client.send(offer)
    client.send_chunks(blob_ref(dense(0.5)), dense(0.5))


def two_keys(client, plan):
    other = SigningKey(b"other".ljust(32))
    client.send_raw(client.sealed(client.hello(public_key=other.public_key), key=other))
    client.send(Decline(round=plan.round, nonce=plan.nonce, reason="enough"))


def with_stages(*stages):
    def disturb(client, plan):
        client.send(client.hello(stages=stages))
        client.say_ready()
        client.send(Decline(round=plan.round, nonce=plan.nonce, reason="enough"))

    return disturb


def another_version(client, plan):
    client.send_raw(msgspec.msgpack.encode([2, client.name * 1000, {"anything": 1}, b""]))
    client.send(Decline(round=plan.round, nonce=plan.nonce, reason="enough"))


def rubbish(client, plan):
    for payload in (b"", b"\0" * 1000, os.urandom(500), b"\x94" * 60_000, bytes(200_000), b"EC\x01\x00" + bytes(70)):
        for kind in ("message", "blob", "other"):
            client.send_raw(payload, kind)


def wants(client, plan):
    """Asks for blobs that there are not, and for one blob a thousand times over."""
    client.send(Want(digest=bytes(32)))
    before = client.transport.bytes_received
    client.send(Want(digest=plan.parameters.digest, ranges=((0, plan.parameters.size),) * 1024))
    client.send(Want(digest=plan.parameters.digest, ranges=((2**53, 0), (5, 1), (2**50, 2**52))))
    client.amplified = lambda: client.transport.bytes_received - before


def silent(client, plan):
    pass


DISTURBANCES = {
    "nan": (offer_bytes(dense(np.nan)), "not finite"),
    "inf": (offer_bytes(dense(-np.inf)), "not finite"),
    "huge values": (offer_bytes(dense(3e38)), "too large"),
    "another length": (offer_bytes(dense(0.5, NUM_PARAMETERS - 1)), f"has {NUM_PARAMETERS - 1} parameters"),
    "longer": (offer_bytes(dense(0.5, NUM_PARAMETERS + 1)), "does not decode"),
    "no codec": (offer_bytes(b"hello, I am an update"), "does not decode"),
    "cut short": (offer_bytes(dense(0.5)[:-7]), "does not decode"),
    "extra bytes": (offer_bytes(dense(0.5) + b"!"), "does not decode"),
    "empty": (offer_bytes(b""), "allowed are 1 to"),
    "oversize": (offer_bytes(bytes(100_000)), "allowed are 1 to"),
    "announced far too large": (
        offer_bytes(dense(0.5), update=BlobRef(digest=bytes(32), size=2**50)),
        "allowed are 1 to",
    ),
    "no examples": (offer_bytes(dense(0.5), num_examples=0), "claims 0 examples"),
    "absurd examples": (offer_bytes(dense(0.5), num_examples=2**53), "claims 9007199254740992 examples"),
    "wrong nonce": (offer_bytes(dense(0.5), nonce=bytes(16)), "another nonce"),
    "wrong run": (offer_bytes(dense(0.5), run=bytes(16)), "is of another run"),
    "a round to come": (offer_bytes(dense(0.5), round=2**40), "too late"),
    "truncated": (truncated, None),
    "forged": (forged, "forged or damaged"),
    "in the name of another": (in_the_name_of("a"), "claims to be from|forged"),
    "wrong chunks": (wrong_chunks, "another blob"),
    "two updates": (two_updates, None),
    "two keys": (two_keys, "belongs to another key"),
    "no codec stages": (with_stages(), "lacks codec stages that everyone has: dense, float32"),
    "unknown codec stages": (with_stages("wavelet"), "lacks codec stages"),
    "another version": (another_version, "protocol version 2"),
    "rubbish": (rubbish, "envelope|exceeds|chunk"),
    "wants": (wants, None),
    "silent": (silent, None),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturber_changes_nothing(federate, name):
    disturbance, reason = DISTURBANCES[name]
    federation = federate(rounds={"total": 2, "goal": 3, "minimum": 2})
    honest = [federation.add(client) for client in ("a", "b")]
    disturber = federation.add("z", type("Z", (Disturber,), {"disturbance": staticmethod(disturbance)}))
    summary = federation.serve()
    assert summary.status == "completed"
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 2))
    assert [record["accepted"] for record in federation.records()] == [2, 2]
    assert disturber.plans, "it was invited"
    for client in honest:
        assert [verdict.accepted for verdict in client.verdicts] == [True, True]
        assert client.refusals == []
    assert not any(verdict.accepted for verdict in disturber.verdicts)
    if reason is not None:
        assert any(re.search(reason, text) for _, text in federation.refused()), federation.refused()
    if name == "wants":
        assert disturber.amplified() < 20_000


def test_a_stranger_that_takes_a_name_has_no_effect_on_its_owner(federate):
    """Another key under the same name: the owner goes on, and the stranger alone is told to go."""
    federation = federate(rounds={"total": 2})
    owner, other = federation.add("a"), federation.add("b")

    class Impostor(ScriptedClient):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.key = SigningKey(b"impostor".ljust(32))

    # It joins when the owner is known already.
    state = {}

    def observe(event):
        if isinstance(event, events.RoundStarted) and not state:
            state["impostor"] = federation.add("a", Impostor)

    federation.serve(observe)
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 2))
    connections = {refusal.connection for refusal in owner.refusals}  # both read the same topic
    assert connections == {state["impostor"].connection}
    assert [verdict.accepted for verdict in other.verdicts] == [True, True]


def test_who_was_not_invited_is_refused(federate):
    """Of three, two are chosen; the third answers all the same, with the nonce it overheard."""
    federation = federate(rounds={"total": 1, "goal": 2})
    plans = []

    class Sharing(ScriptedClient):
        def on_plan(self, plan):
            plans.append(plan)
            self.answered.add(plan.nonce)

        def act(self):
            super().act()
            uninvited = [c for c in federation.clients if not c.plans and c.ready]
            if len(plans) >= 2 and uninvited and not uninvited[0].verdicts and not uninvited[0].pending:
                uninvited[0].answer(plans[0])
            elif len(plans) >= 2 and self.plans and not self.pending and not self.verdicts and uninvited[0].verdicts:
                self.answer(self.plans[0])

    for name in "abc":
        federation.add(name, Sharing)
    federation.serve()
    (outsider,) = [client for client in federation.clients if not client.plans]
    assert [(verdict.accepted, verdict.reason) for verdict in outsider.verdicts] == [
        (False, "not invited to this round")
    ]
    invited = [client.name for client in federation.clients if client.plans]
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(invited, 1))


def test_a_client_without_a_hello_is_asked_to_introduce_itself(federate):
    federation = federate(rounds={"total": 1})
    federation.add("a")
    federation.add("b")
    stranger = ScriptedClient(federation.broker, "stranger", federation.clock)
    stranger.send(Ready(bundle=federation.bundle.digest, runtime="x", num_examples=5))
    stranger.send(Offer(run=bytes(16), round=1, nonce=bytes(16), update=blob_ref(b"x"), num_examples=1, steps=1))
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 1))


def test_another_bundle_is_refused(federate):
    federation = federate(rounds={"total": 1})
    federation.add("a")
    federation.add("b")

    class Stale(ScriptedClient):
        def say_ready(self):
            self.ready = True
            self.send(Ready(bundle=bytes(32), runtime="x", num_examples=5))

    stale = federation.add("stale", Stale)
    federation.serve()
    assert [(r.reason, r.connection) for r in stale.refusals] == [
        ("has another bundle than this run trains", stale.connection)
    ]
    assert stale.plans == []


# --- duplicates, lateness, loss ----------------------------------------------------------------------


class Doubling(ScriptedClient):
    """Everything is sent three times, the chunks in reverse as well, as a broker might."""

    def send_raw(self, payload, kind="message"):
        for _ in range(3):
            super().send_raw(payload, kind)

    def send_chunks(self, ref, update, ranges=()):
        for chunk in reversed(list(cut(ref, update, ranges, 40))):
            self.send_raw(chunk, "blob")


def test_duplicates_count_once(federate):
    federation = federate()
    for name in ("a", "b"):
        federation.add(name, Doubling)
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 3))
    assert [record["accepted"] for record in federation.records()] == [2, 2, 2]
    assert all(verdict.accepted for client in federation.clients for verdict in client.verdicts)


def test_a_repeated_hello_does_not_take_a_client_out(federate):
    """A duplicate is a no-op: the copy of a Hello that comes after the Ready must not make it unready."""
    federation = federate(rounds={"total": 1})
    first = federation.add("a")

    class Repeating(ScriptedClient):
        def say_ready(self):
            super().say_ready()
            self.send(self.hello())

    federation.add("b", Repeating)
    federation.serve()
    assert first.verdicts[0].accepted
    joined = [event.client for event in federation.seen if isinstance(event, events.ClientJoined)]
    assert sorted(joined) == ["a", "b"]


def test_a_late_update_is_refused_and_the_next_round_is_not_disturbed(federate):
    federation = federate(rounds={"total": 3, "goal": 2, "over_selection": 1.5})

    class Late(ScriptedClient):
        def on_plan(self, plan):
            if len(self.plans) == 2:
                self.answered.add(self.plans[0].nonce)
                self.answer(self.plans[0])  # of the first round, in the second

    federation.add("a")
    federation.add("b")
    late = federation.add("late", Late)
    federation.serve()
    assert [verdict.accepted for verdict in late.verdicts] == [False]
    assert "round 1 is closed: too late" in late.verdicts[0].reason
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 3))


def test_lost_chunks_are_asked_for(federate):
    federation = federate(rounds={"total": 1})

    class Lossy(ScriptedClient):
        dropped = 0

        def send_chunks(self, ref, update, ranges=()):
            for number, chunk in enumerate(cut(ref, update, ranges, 50)):
                if not ranges and number % 2:
                    Lossy.dropped += 1
                else:
                    self.send_raw(chunk, "blob")

    federation.add("a", Lossy)
    federation.add("b")
    federation.serve()
    assert Lossy.dropped
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 1))


def test_an_offer_that_was_lost_is_repeated_and_a_verdict_that_was_lost_too(federate):
    federation = federate(rounds={"total": 1})

    class Unlucky(ScriptedClient):
        lost_offer = lost_verdict = False

        def send(self, message):
            if isinstance(message, Offer) and not self.lost_offer:
                self.lost_offer = True
                return
            super().send(message)

        def on_verdict(self, verdict):
            if not self.lost_verdict:
                self.lost_verdict = True
                self.verdicts.pop()
            else:
                super().on_verdict(verdict)

    unlucky = federation.add("a", Unlucky)
    federation.add("b", Unlucky)
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 1))
    # The run is over for the coordinator; a new one in the same directory answers what it is asked again.
    federation.config = msgspec.structs.replace(
        federation.config, rounds=msgspec.structs.replace(federation.config.rounds, total=2)
    )
    federation.serve()
    assert unlucky.verdicts
    assert all(verdict.accepted for verdict in unlucky.verdicts)
    assert unlucky.pending is None
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 2))


def test_patches_are_for_those_who_can_read_them(federate):
    federation = federate(rounds={"total": 3}, downlink_codec="dense|int8:block=64|huffman")
    modern = federation.add("a")

    class Simple(ScriptedClient):
        def hello(self, **changes):
            return super().hello(**{"stages": ("dense", "float32"), **changes})

    simple = federation.add("b", Simple)
    federation.serve()
    assert [bool(plan.patches) for plan in modern.plans] == [False, True, True]
    assert [plan.patches for plan in simple.plans] == [(), (), ()]
    assert len({plan.vector for plan in modern.plans + simple.plans}) == 3
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 3))


# --- deadlines, minimum, retries ---------------------------------------------------------------------


def test_a_round_closes_at_its_deadline_with_the_minimum(federate):
    federation = federate(rounds={"total": 2, "goal": 3, "minimum": 2, "deadline_seconds": 50.0})
    federation.add("a")
    federation.add("b")
    federation.add("z", Disturber)
    started = federation.clock.now
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 2))
    records = federation.records()
    assert [(record["accepted"], record["lost"], record["attempts"]) for record in records] == [(2, 1, 1)] * 2
    assert all(50 <= record["seconds"] < 51 for record in records)
    assert 100 <= federation.clock.now - started < 110


def test_a_decline_is_not_waited_for(federate):
    federation = federate(rounds={"total": 1, "goal": 3, "minimum": 2, "deadline_seconds": 1000.0})
    federation.add("a")
    federation.add("b")
    declines = type("D", (Disturber,), {"disturbance": staticmethod(
        lambda client, plan: client.send(Decline(round=plan.round, nonce=plan.nonce, reason="hot")))})  # fmt: skip
    federation.add("z", declines)
    federation.serve()
    (record,) = federation.records()
    assert (record["accepted"], record["declined"]) == (2, 1)
    assert record["seconds"] < 10


def test_a_client_that_goes_is_not_waited_for(federate):
    federation = federate(rounds={"total": 1, "goal": 3, "minimum": 2, "deadline_seconds": 1000.0})
    federation.add("a")
    federation.add("b")
    gone = type("G", (Disturber,), {"disturbance": staticmethod(
        lambda client, plan: federation.broker.drop(client.transport))})  # fmt: skip
    federation.add("z", gone)
    federation.serve()
    (record,) = federation.records()
    assert (record["accepted"], record["lost"]) == (2, 1)
    assert record["seconds"] < 10
    assert events.ClientLeft("z", "connection lost") in federation.seen


def test_a_failed_round_is_retried_and_keeps_what_it_has(federate):
    """b is silent at first; a's update of the first attempt counts in the second, and only once."""
    federation = federate(rounds={"total": 1, "goal": 2, "deadline_seconds": 20.0})

    class Second(ScriptedClient):
        def on_plan(self, plan):
            if len(self.plans) == 2:
                self.answer(plan)

    first, second = federation.add("a"), federation.add("b", Second)
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 1))
    (record,) = federation.records()
    assert (record["attempts"], record["accepted"]) == (2, 2)
    assert len(first.plans) == 1, "who is in already is not asked again"
    assert len({plan.nonce for plan in second.plans}) == 1


def test_a_run_without_enough_clients_fails_with_advice(federate):
    federation = federate(rounds={"total": 1, "goal": 2, "deadline_seconds": 20.0, "max_failures": 3})
    federation.add("a")
    silent = federation.add("z", Disturber)
    with pytest.raises(RoundFailed, match=r"round 1, attempt 3: 1 updates of at least 2.*after 3 attempts"):
        federation.serve()
    assert len(silent.plans) == 3
    gone = [record for record in records_of(federation.out) if record["type"] == "abandoned"]
    assert [(record["round"], record["attempt"]) for record in gone] == [(1, 1), (1, 2), (1, 3)]
    assert "1 updates of at least 2" in gone[0]["reason"]
    assert msgspec.json.decode((federation.out / "summary.json").read_bytes())["status"] == "failed"


def test_a_failure_names_what_the_clients_said(federate):
    federation = federate(rounds={"total": 1, "goal": 1, "max_failures": 2})
    declines = type("D", (Disturber,), {"on_plan": lambda client, plan: client.send(
        Decline(round=plan.round, nonce=plan.nonce, reason="the loss is not finite"))})  # fmt: skip
    federation.add("z", declines)
    with pytest.raises(RoundFailed, match=r"z: the loss is not finite"):
        federation.serve()


def test_nobody_comes(federate):
    federation = federate(rounds={"idle_timeout_seconds": 60.0})
    started = federation.clock.now
    with pytest.raises(RoundFailed, match=r"round 1: 0 clients are ready after 6\d s, 2 are needed"):
        federation.serve()
    assert 60 <= federation.clock.now - started < 65


def test_the_first_round_waits_a_while_for_the_goal_and_then_takes_the_minimum(federate):
    federation = federate(
        rounds={"total": 1, "goal": 5, "minimum": 1, "gather_seconds": 40.0, "deadline_seconds": 10.0}
    )
    federation.add("a")
    started = federation.clock.now
    federation.serve()
    assert 40 <= federation.clock.now - started < 45
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a"], 1))


def test_over_selection_invites_more_and_closes_at_the_goal(federate):
    federation = federate(rounds={"total": 4, "goal": 2, "over_selection": 2.0})
    for name in "abcd":
        federation.add(name)
    federation.serve()
    # What has arrived by the same look into the queue counts too.
    assert all(record["invited"] == 4 and 2 <= record["accepted"] <= 4 for record in federation.records())
    for client in federation.clients:
        assert len(client.verdicts) == len(client.plans), "everyone hears what became of its update"


# --- evaluation and stopping -------------------------------------------------------------------------


class Evaluated(ScriptedFederation):
    """With an evaluation that a test gives."""

    evaluate = None


def test_it_stops_at_the_target(federate, monkeypatch):
    federation = federate(rounds={"total": 9}, stop=StopConfig(target_accuracy=0.5))
    accuracies = iter([0.1, 0.3, 0.4, 0.6])
    from support import scripted

    real = scripted.Coordinator
    monkeypatch.setattr(
        scripted, "Coordinator", lambda *a, **k: real(*a, evaluate=lambda _p: Evaluation(1.0, next(accuracies)), **k)
    )
    federation.add("a")
    federation.add("b")
    summary = federation.serve()
    assert (summary.rounds, summary.final_accuracy) == (3, 0.6)
    assert summary.reason == "accuracy 0.6000 reached the target of 0.5"


def test_clients_report_on_their_own_data(federate):
    federation = federate(rounds={"total": 1, "goal": 3, "minimum": 3}, evaluation=EvaluationConfig(by_clients=True))

    class Reporting(ScriptedClient):
        metrics = {"accuracy": 0.75}

        def on_plan(self, plan):
            super().on_plan(plan)

        def act(self):
            super().act()
            for plan in self.plans:
                if plan.task == "evaluate" and plan.nonce not in self.answered:
                    self.answered.add(plan.nonce)
                    self.send(
                        Report(run=plan.run, round=plan.round, nonce=bytes(16), num_examples=1, metrics={"accuracy": 0})
                    )
                    self.send(
                        Report(run=plan.run, round=plan.round, nonce=plan.nonce, num_examples=1, metrics=self.metrics)
                    )

    federation.add("a", Reporting)
    federation.add("b", type("Odd", (Reporting,), {"metrics": {"accuracy": float("nan")}}))
    federation.add("c")  # says nothing
    started = federation.clock.now
    summary = federation.serve()
    assert summary.accuracy_by_client == {"a": 0.75}
    assert federation.clock.now - started < 120


def test_numbers_that_are_not_finite_stay_out_of_the_records(federate):
    federation = federate(rounds={"total": 1})

    class Odd(ScriptedClient):
        def offer(self, plan, payload, **changes):
            return super().offer(plan, payload, metrics={"loss": float("nan"), "accuracy": float("inf")}, **changes)

    federation.add("a", Odd)
    federation.add("b")
    federation.serve()
    assert federation.records()[0]["train_loss"] == 1.0
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 1))


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"), [({"codec": "topk:0.1|zip"}, CodecError), ({"strategy": "fedfoo"}, ConfigError)]
)
def test_wrong_settings_are_errors_before_anything_starts(federate, settings, error):
    with pytest.raises(error, match="zip|fedfoo"):
        federate(**settings).serve()


def test_the_limits_are_the_configured_ones(federate):
    federation = federate(
        rounds={"total": 1, "goal": 1, "max_failures": 1}, limits=LimitsConfig(max_examples=9, max_update_bytes=10_000)
    )
    greedy = federation.add("a", num_examples=10)
    with pytest.raises(RoundFailed):
        federation.serve()
    assert "allowed are 1 to 9" in greedy.verdicts[0].reason


def test_a_chunk_has_no_more_bytes_than_configured(federate):
    federation = federate(rounds={"total": 1, "goal": 3, "minimum": 2}, limits=LimitsConfig(chunk_bytes=1024))
    federation.add("z", Disturber)  # so that time passes
    largest = []

    class Curious(ScriptedClient):
        def say_ready(self):
            self.transport.subscribe(self.topics.broadcast_blob(self.bundle))
            self.send(Want(digest=self.bundle))

        def _on_received(self, event):
            if "/blob" in event.topic:
                largest.append(len(event.payload) - HEADER_BYTES)
                super().say_ready()
            super()._on_received(event)

    federation.add("a", Curious)
    federation.add("b", Curious)
    federation.serve()
    assert max(largest) == 1024
    assert federation.config.federation == FEDERATION


def test_a_thousand_messages_at_once_are_all_handled(federate):
    """More than the coordinator handles between two syncs: nobody has to say anything twice."""
    count = 600
    federation = federate(rounds={"total": 1, "goal": count})
    for number in range(count):
        federation.add(f"c{number:03d}")
    started = federation.clock.now
    assert federation.serve().updates == count
    # A lost message is repeated after ten seconds, a lost chunk asked for after three.
    assert federation.clock.now - started < 3

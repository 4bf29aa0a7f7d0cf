"""Rounds of secure aggregation with the real coordinator and clients: exact, also when processes end in the middle."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
from collections import Counter

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edgetrain.coordinator import events
from edgetrain.coordinator.audit.verify import records_of
from edgetrain.coordinator.config import FederationConfig, RoundsConfig, SelectionConfig, StopConfig
from edgetrain.coordinator.errors import RoundFailed, RunError
from edgetrain.coordinator.intake import Intake
from edgetrain.coordinator.privacy.config import PrivacyConfig
from edgetrain.coordinator.rounds.invitations import NO_CODEC, Invitations, checked_strategy
from edgetrain.coordinator.secure.config import SecureAggregationConfig
from edgetrain.coordinator.secure.coordinator import SecureCoordinator
from edgetrain.coordinator.secure.round import SecureRound
from edgetrain.coordinator.secure.settings import round_settings
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.config import SecureAggregationConfig as Demands
from edgetrain.edge_client.errors import StateError
from edgetrain.edge_client.privacy import secure_aggregation as participation
from edgetrain.edge_client.privacy.enrolled import read_enrolled
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.enrolment import Authority, authority_key, prove_enrolment
from edgetrain.protocol.errors import ConfigError, SecureAggregationError
from edgetrain.protocol.messages import BlobRef, Plan
from edgetrain.protocol.privacy import PrivacyError, Release, spent
from edgetrain.protocol.privacy.ledger_file import read_ledger, releases_with
from edgetrain.protocol.secure_aggregation import member as members
from edgetrain.protocol.secure_aggregation.arithmetic import Quantizer, make_layout
from edgetrain.protocol.secure_aggregation.messages import Settings, encode
from edgetrain.protocol.secure_aggregation.support import support_of
from support.secure_federation import CODEC, PHASE_SECONDS, Crash, SecureFederation


@pytest.fixture
def federate(ram_path, tiny_bundle, monkeypatch):
    made = []

    def make(name="f", **options):
        path = ram_path / name
        path.mkdir()
        made.append(SecureFederation(path, tiny_bundle, monkeypatch, **options))
        return made[-1]

    yield make
    for federation in made:
        federation.close()


def finish(federation):
    federation.finish()
    records = [json.loads(line) for line in (federation.directory / "run/rounds.jsonl").read_text().splitlines()]
    assert not list((federation.directory / "run/journal").iterdir())
    return records


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_bundle):
    """Parameters after two rounds of three clients that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        federation = SecureFederation(tmp_path_factory.mktemp("undisturbed"), tiny_bundle, patch)
        federation.start()
        federation.secure_coordinator().run()
        federation.finish()
    return federation.parameters()


def test_the_parameters_are_the_plain_sum_of_what_the_clients_quantized(federate, tiny_bundle):
    federation = federate(clients=4)
    federation.start()
    federation.secure_coordinator(rounds={"total": 1}).run()
    records = finish(federation)
    assert [record["accepted"] for record in records] == [4]
    assert records[0]["num_examples"] == 140
    start = Bundle(tiny_bundle).initial_parameters().astype(np.float64)
    integers, weights = np.zeros(33, np.int64), 0
    for calls in federation.quantized.values():
        ((values, weight, quantizer, layout), result) = calls[0]
        assert layout.count == len(values) == 33
        assert layout.bits == 10, "2 * 4 * 127 + 1 = 1,017 sums"
        integers += result.integers[:33]
        weights += weight
    support = support_of(Settings(minimum=2, count=33, seed=1, quantizer=quantizer), len(start))
    mean = integers * (quantizer.range / 127 / (weights / 50))
    expected = start.copy()
    # The coordinator folds the mean as a float32, in units of 2^-30 of the weighted sum.
    expected[support] += np.rint(mean.astype(np.float32).astype(np.float64) * weights * 2.0**30) / 2.0**30 / weights
    names = [(entry.name, entry.offset, int(np.prod(entry.shape))) for entry in Bundle(tiny_bundle).manifest.parameters]
    ordered = np.concatenate([expected[offset : offset + size] for _, offset, size in sorted(names)])
    np.testing.assert_array_equal(federation.parameters(), ordered.astype(np.float32))
    # It is close to the mean of what the clients learnt, and something was learnt.
    assert np.abs(mean).max() > 1e-4


def test_what_is_not_in_the_sum_stays_with_the_clients(federate):
    """Error feedback: target - decoded on the support, the whole target elsewhere."""
    federation = federate()
    federation.start()
    federation.secure_coordinator(rounds={"total": 1}).run()
    finish(federation)
    for name, calls in federation.quantized.items():
        ((values, _weight, _quantizer, _layout), result) = calls[0]
        residual = federation.clients[name]._rounds._feedback.residual
        left = values - result.decoded
        assert set(np.round(left[left != 0], 6)) <= set(np.round(residual, 6))
        assert np.count_nonzero(residual) > 33, "what is outside of the support waits there"
        assert federation.clients[name]._rounds._feedback.trained_on == b""


def test_two_rounds_adapt_the_range(federate):
    federation = federate()
    federation.start()
    federation.secure_coordinator(rounds={"total": 3}, secure={"value_range": 50.0, "support": "last-sum"}).run()
    assert [record["accepted"] for record in finish(federation)] == [3, 3, 3]
    ranges = [call[0][2].range for call in federation.quantized["client-0"]]
    assert ranges[0] == 50.0
    assert ranges[1] < 1, "values are far smaller"


@pytest.mark.parametrize("phase", ["advertised", "shared", "masked", "agreed", "revealed"])
def test_a_client_that_ends_in_the_middle_goes_on(federate, undisturbed, phase):
    """Everybody is needed, so without its part there is no round; the result is the same to the bit. Before it has
    told anyone its keys there is nobody to wait for, and between masking and storing its update its keys are gone:
    these two attempts are given up, and the round tried again."""
    again = phase in {"advertised", "masked"}
    federation = federate()
    federation.crash_client("client-1", phase, missed=phase == "masked")
    federation.start()
    coordinator = federation.secure_coordinator()
    starter = threading.Thread(target=federation.restart_client, args=("client-1",))
    starter.start()
    coordinator.run()
    starter.join()
    records = finish(federation)
    assert [(record["accepted"], record["attempts"]) for record in records] == [
        (3, 2 if again else 1),
        (3, 1),
    ]
    np.testing.assert_array_equal(federation.parameters(), undisturbed)


@pytest.mark.parametrize(
    ("phase", "told"),
    [*itertools.product(["share", "mask", "agree", "reveal"], [False, True]), ("done", True)],
)
def test_a_coordinator_that_ends_in_the_middle_goes_on(federate, undisturbed, phase, told):
    federation = federate()
    federation.crash_coordinator(phase, told=told)
    federation.start()
    with pytest.raises(Crash):
        federation.secure_coordinator().run()
    federation.close_directories()
    federation.secure_coordinator().run()
    records = finish(federation)
    assert [(record["accepted"], record["attempts"]) for record in records] == [(3, 1), (3, 1)]
    np.testing.assert_array_equal(federation.parameters(), undisturbed)


def test_other_settings_in_the_middle_of_a_session(federate, undisturbed):
    """What clients were told cannot be changed: said at once, and nothing is lost."""
    federation = federate()
    federation.crash_coordinator("mask", told=True)
    federation.start()
    with pytest.raises(Crash):
        federation.secure_coordinator().run()
    federation.close_directories()
    with pytest.raises(RunError, match="cannot be taken up: shares for another roster. Go on with the settings"):
        federation.secure_coordinator(secure={"neighbours": 2, "threshold": 3, "max_colluding": 0.0}).run()
    federation.close_directories()
    federation.secure_coordinator().run()
    assert [record["accepted"] for record in finish(federation)] == [3, 3]
    np.testing.assert_array_equal(federation.parameters(), undisturbed)


def test_a_client_that_was_not_invited_gets_no_part(federate):
    federation = federate(clients=4)
    seen = []
    federation.start()
    federation.secure_coordinator(rounds={"total": 2, "goal": 3, "minimum": 3}, observe=seen.append).run()
    assert [record["accepted"] for record in finish(federation)] == [3, 3]
    assert all(event.invited == 3 for event in seen if isinstance(event, events.RoundStarted))


def test_too_few_for_a_sum_and_nothing_is_revealed(federate, undisturbed):
    """A client is gone when its vector is needed: the attempt is given up, later the round is done without a trace."""
    federation = federate()
    federation.crash_client("client-2", "shared", missed=True)
    federation.start()
    coordinator = federation.secure_coordinator()
    given_up, give_up = threading.Event(), SecureCoordinator._give_up

    def noticed(this, *arguments, **options):
        give_up(this, *arguments, **options)
        given_up.set()

    def come_back():
        assert given_up.wait(20)
        federation.restart_client("client-2")

    federation.monkeypatch.setattr(SecureCoordinator, "_give_up", noticed)
    restart = threading.Thread(target=come_back)
    restart.start()
    coordinator.run()
    restart.join()
    records = finish(federation)
    assert [(record["accepted"], record["attempts"]) for record in records] == [(3, 2), (3, 1)]
    gone = [record for record in records_of(federation.directory / "run") if record["type"] == "abandoned"]
    assert [record["attempt"] for record in gone] == [1]
    np.testing.assert_array_equal(federation.parameters(), undisturbed)


def test_too_often_too_few(federate):
    federation = federate()
    federation.crash_client("client-2", "shared", missed=True)
    federation.start()
    with pytest.raises(RoundFailed, match="no sum"):
        federation.secure_coordinator(rounds={"max_failures": 1, "idle_timeout_seconds": 20.0}).run()
    federation.finish()
    assert all(client._secure._stored.member.phase != "revealed" for client in federation.clients.values()
               if client._secure._stored)  # fmt: skip


def test_a_round_that_lost_its_sum_when_shares_were_asked_for_is_not_summed_again(federate):
    """Two of three must reveal and only one does: the round ends without a change, the next takes everything."""
    federation = federate()
    plain, spoiled = members.reveal, []

    def reveal(member, agreements):
        if member.name != "client-0" and spoiled.count(member.name) < 1:
            spoiled.append(member.name)
            raise Crash
        return plain(member, agreements)

    federation.monkeypatch.setattr(members, "reveal", reveal)
    caught = participation.SecureParticipation._on_message

    def on_message(this, message):
        with contextlib.suppress(Crash):  # it stays silent
            caught(this, message)

    for client in federation.clients.values():
        client._mail.on_secure = lambda message, this=client._secure: on_message(this, message)
    plain_step, late = SecureRound.step, [PHASE_SECONDS]

    def step(this, **options):
        if late and len(spoiled) == 2 and (this.server.phase, len(this.server.answered)) == ("reveal", 1):
            federation.leap(late.pop())
        return plain_step(this, **options)

    federation.monkeypatch.setattr(SecureRound, "step", step)
    federation.start()
    federation.secure_coordinator().run()
    records = finish(federation)
    assert [record["accepted"] for record in records] == [0, 3]
    gone = [record for record in records_of(federation.directory / "run") if record["type"] == "abandoned"]
    assert [(record["round"], record["revealing"]) for record in gone] == [(1, True)]
    assert records[0]["parameters_sha256"] != records[1]["parameters_sha256"]


def test_a_sum_that_is_private_from_the_coordinator_too(federate):
    """Every client adds its share of noise; the budget pays for each round and refuses the one too many."""
    federation = federate()
    federation.start()
    private = {
        "noise_multiplier": 1.0, "max_norm": 0.5, "weighting": "equal", "adapt_range": False, "value_range": 0.25,
    }  # fmt: skip
    summary = federation.secure_coordinator(
        secure=private, rounds={"total": 50}, privacy=PrivacyConfig(epsilon=15.0, delta=1e-5)
    ).run()
    records = finish(federation)
    assert len(records) == summary.rounds == 6
    assert "refused before it started" in summary.reason
    spent = [record["epsilon"] for record in records]
    # The exact epsilon of the Gaussian mechanism for 1 to 5 rounds (Balle and Wang 2018, theorem 8); accounting by RDP
    # costs a little more.
    for exact, epsilon in zip((4.377, 6.573, 8.385, 9.997, 11.480), spent, strict=False):
        assert exact < epsilon < 1.09 * exact
    assert spent[-1] <= 15.0
    calls = federation.quantized["client-0"]
    ((_values, _weight, quantizer, layout), result) = calls[0]
    step = 0.25 / 127
    # In all 3 clients a deviation of max_norm: in each 0.5 / sqrt(3), in steps; 20 deviations and 64 at most.
    deviation = 0.5 / np.sqrt(3) / step
    assert quantizer.noise_bound == int(np.ceil(20 * deviation)) + 64
    assert layout.bits == (2 * 3 * (127 + quantizer.noise_bound)).bit_length()
    noise = np.concatenate([
        result.integers - np.rint(result.decoded / step) for calls in federation.quantized.values()
        for _, result in calls
    ])  # fmt: skip
    assert abs(noise.std() / deviation - 1) < 4 / np.sqrt(2 * len(noise))
    assert abs(noise.mean()) < 4 * deviation / np.sqrt(len(noise))
    for calls in federation.quantized.values():
        for _, result in calls:
            assert np.linalg.norm(result.decoded / step) <= 0.5 / step * 1.0001, "also after rounding"


PRIVATE = {
    "noise_multiplier": 1.0, "max_norm": 0.5, "weighting": "equal", "adapt_range": False, "value_range": 0.25,
    "max_colluding": 0.0,
}  # fmt: skip


def invited(federation):
    """By (round, attempt)."""
    found = {}
    for record in records_of(federation.directory / "run"):
        if record["type"] == "invited":
            found.setdefault((record["round"], record.get("attempt", 1)), set()).add(record["client"])
    return found


@pytest.mark.parametrize(
    ("sampling", "clients", "goal", "divisor"),
    [("fixed", 4, 3, 2.0), ("poisson", 15, 14, 1.0)],
)
def test_chance_and_a_sum_that_is_private_from_the_coordinator(federate, sampling, clients, goal, divisor):
    """Clients are drawn, the budget counts on it, and the ledger keeps what it costs whoever is known to be in."""
    federation = federate(clients=clients)
    federation.start()
    secure = PRIVATE | {"sampling": sampling, "population": clients}
    summary = federation.secure_coordinator(
        secure=secure, rounds={"total": 3, "goal": goal, "minimum": 3},
        privacy=PrivacyConfig(epsilon=200.0, delta=1e-5),
    ).run()  # fmt: skip
    records = finish(federation)
    assert [record["accepted"] for record in records] == [record["invited"] for record in records]
    if sampling == "fixed":
        assert [record["accepted"] for record in records] == [3, 3, 3]
    ledger = read_ledger(federation.directory / "privacy-test.json")
    (release,) = ledger.releases
    # The noise is what it is; one client replaced by another changes the sum by twice the norm.
    assert (release.sampling, release.sampling_rate, release.steps) == (sampling, goal / clients, 3)
    assert release.noise_multiplier == 1.0 / divisor
    assert release.noise_multiplier * release.l2_sensitivity == pytest.approx(0.5 / (0.25 / 127))
    assert summary.epsilon == pytest.approx(spent([release], 1e-5).epsilon)
    # In the shares of three: the fewest that a sum is shown of.
    assert release.shares == 3
    times = Counter(itertools.chain.from_iterable(invited(federation).values()))
    assert {name: sum(steps) for name, steps in ledger.participants.items()} == times
    name = max(times, key=times.__getitem__)
    known = msgspec.structs.replace(release, sampling="none", sampling_rate=1.0, steps=times[name])
    assert spent(releases_with(ledger, name), 1e-5) == spent([known], 1e-5)


def test_devices_count_for_themselves(federate):
    """The coordinator's budget would do for many rounds; that of a device is spent after two, whatever it says. And it
    outlives the process."""
    step = 0.25 / 127
    one = Release(
        mechanism="discrete-gaussian", noise_multiplier=1.0, l2_sensitivity=0.5 / step, dimension=33, shares=3
    )
    twice = spent([msgspec.structs.replace(one, steps=2)], 1e-5).epsilon
    federation = federate(secure_aggregation=Demands(epsilon=1.001 * twice, delta=1e-5))
    federation.start()
    generous = PrivacyConfig(epsilon=500.0, delta=1e-5)
    with pytest.raises(RoundFailed, match=r"round 3.*the privacy budget does not allow it"):
        federation.secure_coordinator(secure=PRIVATE, rounds={"total": 9, "max_failures": 1}, privacy=generous).run()
    federation.finish()
    for name in federation.clients:
        ledger = read_ledger(federation.directory / name / "privacy-sums.json")
        assert ledger.releases == (msgspec.structs.replace(one, steps=2),)
    federation.reopen()
    federation.start()
    with pytest.raises(RoundFailed, match="the privacy budget does not allow it"):
        federation.secure_coordinator(secure=PRIVATE, rounds={"total": 9, "max_failures": 1}, privacy=generous).run()
    federation.finish()
    assert read_ledger(federation.directory / "client-0/privacy-sums.json").releases[0].steps == 2
    # Nor without noise, nor without secure aggregation.
    federation.reopen()
    secure = federation.clients["client-0"]._secure
    plan = Plan(run=bytes(16), round=1, nonce=bytes(16), bundle=bytes(32), vector=bytes(32),
                parameters=BlobRef(digest=bytes(32), size=1), deadline_seconds=1)  # fmt: skip
    with pytest.raises(SecureAggregationError, match="in secure aggregation only"):
        secure.check(plan)
    bare = encode(Settings(minimum=3, count=7, seed=1, quantizer=Quantizer(range=0.5)))
    with pytest.raises(PrivacyError, match="the plan has none of their noise"):
        secure.check(msgspec.structs.replace(plan, secure=bare))
    for client in federation.clients.values():
        client._secure.close()


def test_devices_take_part_with_those_alone_whom_the_ca_has_enrolled(federate):
    """A coordinator that lets one in on its own word gets no sum, and hears why."""
    ca = ec.generate_private_key(ec.SECP256R1())
    authority = Authority(authority_key(ca.public_key()), "test")

    def federation_with(name, strangers):
        made = federate(name)
        for client in made.clients.values():
            name, key = client._config.name, client._state.key.public_key
            secure = client._secure
            secure._is_enrolled = authority.has_enrolled
            if name not in strangers:
                proof = prove_enrolment(ca, federation="test", name=name, public_key=key)
                secure._config = msgspec.structs.replace(secure._config, enrolment=proof.hex())
        made.start()
        return made

    known = federation_with("known", ())
    known.secure_coordinator(rounds={"total": 1}).run()
    assert [record["accepted"] for record in finish(known)] == [3]
    made_up = federation_with("made up", ("client-2",))
    on_decline = Intake._on_decline

    def declined(this, *arguments):
        on_decline(this, *arguments)
        made_up.leap(PHASE_SECONDS)

    made_up.monkeypatch.setattr(Intake, "_on_decline", declined)
    with pytest.raises(RoundFailed, match=r"'client-2' is in the roster with a key that is not enrolled"):
        made_up.secure_coordinator(rounds={"total": 1, "max_failures": 1}).run()
    made_up.finish()


def test_an_attempt_that_fails_is_tried_again_with_the_same_draw(federate):
    """Also by the next process. The log and the ledger know of it: nothing was revealed, so nothing was paid for."""
    federation = federate(clients=4)
    failed = []
    plain = SecureRound.step

    def step(this, **options):
        done = plain(this, **options)
        if this.server.phase == "mask" and len(failed) < 2:
            failed.append(this)
            raise SecureAggregationError("lost on purpose")
        return done

    federation.monkeypatch.setattr(SecureRound, "step", step)
    plans = []
    make_plan = Invitations.plan

    def plan(this, *arguments):
        plans.append(make_plan(this, *arguments))
        return plans[-1]

    federation.monkeypatch.setattr(Invitations, "plan", plan)
    secure = PRIVATE | {"sampling": "fixed", "population": 4}

    def serve():
        federation.start()
        federation.secure_coordinator(
            secure=secure, rounds={"total": 1, "goal": 3, "minimum": 3, "max_failures": 2},
            privacy=PrivacyConfig(epsilon=200.0, delta=1e-5),
        ).run()  # fmt: skip

    with pytest.raises(RoundFailed, match="lost on purpose"):
        serve()
    federation.finish()
    federation.reopen()
    serve()
    (record,) = finish(federation)
    assert (record["attempts"], record["accepted"]) == (1, 3), "in this process"
    assert all(plan.secure and plan.codec == NO_CODEC for plan in plans), "nobody is ever asked for a plain update"
    draws = invited(federation)
    assert draws == {(1, 1): draws[1, 1], (1, 2): draws[1, 1]}
    assert len(draws[1, 1]) == 3
    gone = [record for record in records_of(federation.directory / "run") if record["type"] == "abandoned"]
    assert [(record["round"], record["attempt"]) for record in gone] == [(1, 1), (1, 2)]
    assert all("lost on purpose" in record["reason"] and "revealing" not in record for record in gone)
    ledger = read_ledger(federation.directory / "privacy-test.json")
    assert [release.steps for release in ledger.releases] == [1]


def test_too_few_there_for_a_draw(federate):
    """A draw of two would show that it was one. Six places of eight, four of them empty: that has a chance of 6 / 28
    (with three there 18 / 28), so nobody is drawn."""
    federation = federate(clients=4)
    federation.start()
    with pytest.raises(
        RoundFailed, match=r"of (4|3) clients that are here fewer than 3 may be drawn \(probability 0\.(21|64)"
    ):
        federation.secure_coordinator(
            secure=PRIVATE | {"sampling": "fixed", "population": 8},
            rounds={"total": 1, "goal": 6, "minimum": 3, "max_failures": 1, "gather_seconds": 0.5},
            privacy=PrivacyConfig(epsilon=200.0, delta=1e-5),
        ).run()  # fmt: skip
    federation.finish()
    assert not invited(federation)


def settings_for(**changes):
    fields = {
        "federation": "f", "bundle": "b", "out": "o", "codec": CODEC,
        "rounds": RoundsConfig(goal=4, minimum=3),
        "secure_aggregation": SecureAggregationConfig(enabled=True),
    }  # fmt: skip
    return FederationConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": {"name": "fedbuff", "staleness": "constant"}}, "synchronous"),
        ({"strategy": "median"}, "compares single updates"),
        ({"strategy": "krum"}, "compares single updates"),
        ({"strategy": {"name": "norm-bound", "max_norm": 1.0}}, "let the clients clip"),
        ({"strategy": "fednova"}, "own norm"),
        ({"strategy": "scaffold"}, "control variates"),
        ({"codec": "topk:0.05|int8:block=256|rice"}, "every client chooses its own parameters"),
        ({"codec": "randk:0.05|int8:block=256:stochastic"}, "in the same unit"),
        ({"codec": "randk:0.05|int8:block=all"}, "in the same unit"),
        ({"codec": "dense|float32"}, "in the same unit"),
        ({"rounds": RoundsConfig(goal=2)}, "each client knows the other's"),
        ({"stop": StopConfig(metric="train_loss")}, "single updates"),
        ({"selection": SelectionConfig(method="utility")}, "losses of their updates"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, noise_multiplier=1.0)}, "set it"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, noise_multiplier=1.0, max_norm=1.0)},
         "noise is added to values"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, noise_multiplier=1.0, max_norm=1.0,
                                                        weighting="equal", adapt_range=False, max_colluding=0.4),
          "rounds": RoundsConfig(goal=8, minimum=3)}, "leave out their noise"),
        ({"strategy": {"name": "dp-fedavg", "clip_norm": 1.0, "noise_multiplier": 1.0, "clients_per_round": 4}},
         "sum"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, neighbours=7)}, "even"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, threshold=7)}, "set neighbours, too"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, sampling="fixed", population=9)},
         "is for the privacy budget"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, population=9)}, "says nothing without sampling"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, **PRIVATE, sampling="fixed", population=3)},
         "at least rounds.goal = 4"),
        ({"secure_aggregation": SecureAggregationConfig(enabled=True, **PRIVATE, sampling="poisson", population=8)},
         r"fewer than 3 of 8 clients may be drawn \(probability 0.14\)"),
        ({"rounds": RoundsConfig(goal=1000, minimum=500),
          "secure_aggregation": SecureAggregationConfig(enabled=True, max_bits=10)}, "too few for the sum of 1000"),
        ({"rounds": RoundsConfig(goal=1000, minimum=500),
          "secure_aggregation": SecureAggregationConfig(enabled=True, neighbours=10)}, "too few against 10%"),
    ],
)  # fmt: skip
def test_stacks_that_make_no_sense(changes, why):
    with pytest.raises(ConfigError, match=why):
        checked_strategy(settings_for(**changes))


@pytest.mark.parametrize(
    ("goal", "over", "codec", "max_bits", "largest", "bits"),
    [
        # floor((2^14 - 1) / (2 n)), by hand, and what 2 n L + 1 sums then take.
        (64, 1.0, "int8", 14, 127, 14), (100, 1.0, "int8", 14, 81, 14), (1000, 1.0, "int8", 14, 8, 14),
        (1000, 1.3, "int8", 14, 6, 14), (1000, 1.0, "int4", 14, 7, 14), (1000, 1.0, "int8", 0, 127, 18),
    ],
)  # fmt: skip
def test_many_clients_write_coarser_integers(goal, over, codec, max_bits, largest, bits):
    config = settings_for(
        codec=f"randk:0.05|{codec}:block=all:stochastic|packed", rounds=RoundsConfig(goal=goal, over_selection=over),
        secure_aggregation=SecureAggregationConfig(enabled=True, max_bits=max_bits),
    )  # fmt: skip
    checked_strategy(config)
    quantizer = round_settings(config, number=1, num_parameters=1000, state={}, largest_weight=1).quantizer
    assert quantizer.levels == largest
    assert make_layout(quantizer, count=50, clients=math.ceil(goal * over)).bits == bits


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "fedavgm", "fedsgd", "fedyogi"])
def test_stacks_that_do(strategy):
    checked_strategy(settings_for(strategy=strategy))
    checked_strategy(settings_for(strategy=strategy, codec="dense|int4:block=all:stochastic"))


def test_what_a_client_asks_for(tmp_path, federate):
    """Without them it sends nothing, whatever the coordinator says."""
    federation = federate()
    secure = federation.clients["client-0"]._secure
    good = Settings(minimum=3, count=7, seed=1, quantizer=Quantizer(range=0.5))
    plan = Plan(run=bytes(16), round=1, nonce=bytes(16), bundle=bytes(32), vector=bytes(32),
                parameters=BlobRef(digest=bytes(32), size=1), deadline_seconds=1, secure=encode(good))  # fmt: skip
    secure.check(plan)
    with pytest.raises(SecureAggregationError, match="sums of 2 clients: this client asks for 3"):
        secure.check(msgspec.structs.replace(plan, secure=encode(msgspec.structs.replace(good, minimum=2))))
    secure._config = ClientConfig(name="c", federation="f", data="d",
                                  secure_aggregation=Demands(least_noise=0.5))  # fmt: skip
    with pytest.raises(SecureAggregationError, match=r"a noise multiplier of 0: this client asks for 0\.5"):
        secure.check(plan)
    secure.check(msgspec.structs.replace(
        plan, secure=encode(msgspec.structs.replace(good, noise_multiplier=0.5, max_norm=1.0))
    ))  # fmt: skip
    with pytest.raises(SecureAggregationError, match="in the clear"):
        secure.check(msgspec.structs.replace(plan, control=plan.parameters))
    plain = msgspec.structs.replace(plan, secure=b"")
    secure.check(plain)
    secure._config = ClientConfig(name="c", federation="f", data="d",
                                  secure_aggregation={"required": True, "least_clients": 3})  # fmt: skip
    secure._config = msgspec.convert(msgspec.to_builtins(secure._config), ClientConfig)
    with pytest.raises(SecureAggregationError, match="in secure aggregation only"):
        secure.check(plain)
    secure.close()
    path = tmp_path / "enrolled"
    path.write_text(f"# ours\nc {'ab' * 32}\n\n")
    is_enrolled = read_enrolled(path)
    assert is_enrolled("c", b"\xab" * 32)
    assert not is_enrolled("c", bytes(32))
    assert not is_enrolled("d", b"\xab" * 32)
    path.write_text("c abc\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_enrolled(path)


def test_a_client_that_cannot_store_its_session_says_nothing_of_it(federate):
    """What it said would be forgotten with the process, and could be said a second time in another way."""
    federation = federate()
    client, sent = federation.clients["client-0"], []
    client._mail.send = sent.append
    (client._state.path / "secure.bin").mkdir()
    settings = Settings(minimum=3, count=7, seed=1, quantizer=Quantizer(range=0.5))
    plan = Plan(run=bytes(16), round=1, nonce=bytes(16), bundle=bytes(32), vector=bytes(32),
                parameters=BlobRef(digest=bytes(32), size=1), deadline_seconds=1, secure=encode(settings))  # fmt: skip
    feedback = client._state.error_feedback(bundle=bytes(32), run=bytes(16), num_parameters=66)
    for _ in range(2):
        with pytest.raises(StateError, match="cannot store the session"):
            client._secure.take_part(plan, feedback, weight=1, seed=0, resources=None, fetch=None, is_over=lambda: True)
    assert sent == []

"""A coordinator that ends at any point, and the next one in the same directory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.coordinator.test_coordinator import expected_parameters, final_parameters

from edgetrain.coordinator import events
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.run.database import RunDatabase
from edgetrain.coordinator.run.journal import Invited, Journal, RoundOpened, UpdateAccepted
from edgetrain.coordinator.run.journal_reading import read_journal
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.strategies import make_strategy
from edgetrain.protocol.codecs import Limits
from edgetrain.protocol.signing import SigningKey
from support.scripted import Crash, ScriptedClient, ScriptedFederation

NAMES = ["a", "b", "c"]
ROUNDS = {"total": 3, "goal": 3, "deadline_seconds": 30.0}


def at_event(number):
    """An observer that ends the process at the n-th event of its life."""
    seen = []

    def observe(event):
        seen.append(event)
        if len(seen) == number:
            raise Crash

    return observe


def verdicts_of(client):
    """Round by round: whether its update was accepted in the end; False if it was ever refused."""
    result = {}
    for verdict in client.verdicts:
        result[verdict.round] = result.get(verdict.round, True) and verdict.accepted
    return result


def check(federation):
    """Nothing lost, nothing twice: the parameters are those of a run without a crash, to the bit."""
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 3))
    assert [record["round"] for record in federation.records()] == [1, 2, 3]
    assert [record["accepted"] for record in federation.records()] == [3, 3, 3]
    rows = (federation.out / "clients.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[:3] for row in rows) == [
        [str(number), name, "accepted"] for number in (1, 2, 3) for name in NAMES
    ]
    for client in federation.clients:
        verdicts = verdicts_of(client)
        assert all(verdicts.values()), "no accepted update was ever called refused"
        # The answer that a crash took with it is given when it is asked for again, at the latest in the next run.
        assert {1, 2, 3} - verdicts.keys() <= ({client.pending[0].round} if client.pending else set())
    assert not list((federation.out / "journal").iterdir())


@pytest.mark.parametrize("number", range(1, 24))
def test_wherever_it_ends_the_result_is_the_same_to_the_bit(tiny_bundle, ram_path, number):
    run_with_crashes(tiny_bundle, ram_path, [number])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crashes=st.lists(st.integers(1, 16), min_size=2, max_size=5))
def test_however_often_it_ends_the_result_is_the_same_to_the_bit(tiny_bundle, ram_path, crashes):
    run_with_crashes(tiny_bundle, Path(tempfile.mkdtemp(dir=ram_path)), crashes)


def run_with_crashes(tiny_bundle, path, crashes):
    federation = ScriptedFederation(tiny_bundle, path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)
    for number in crashes:
        try:
            federation.serve(at_event(number))
        except Crash:
            continue
    federation.serve()
    federation.act()
    check(federation)


@pytest.mark.parametrize("clients", ["stay", "restart"])
def test_an_end_between_acceptance_and_its_verdict(tiny_bundle, ram_path, clients):
    """The update is in the journal; its client has not heard so, and asks again."""
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and event.accepted == 2:
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    accepted = [meta.client for meta, _ in read_journal(ram_path / "run/journal/round-00001.journal")
                if isinstance(meta, UpdateAccepted)]  # fmt: skip
    assert len(accepted) == 2
    assert all(not client.verdicts for client in federation.clients)
    if clients == "restart":
        # As a client process does: a new connection, the pending update from its disk.
        for old in federation.clients[:]:
            federation.broker.drop(old.transport)
            federation.clients.remove(old)
            new = federation.add(old.name)
            new.pending, new.answered = old.pending, old.answered
            new.last_sent = -1000.0
    federation.serve()
    check(federation)


def test_a_kill_between_the_journal_and_the_rounds_row(tiny_bundle, ram_path, monkeypatch):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)
    real = RunDatabase.close_rounds
    armed = [True]

    def close_rounds(self, closed, clients=()):
        if armed and armed.pop():
            raise Crash
        real(self, closed, clients)

    monkeypatch.setattr(RunDatabase, "close_rounds", close_rounds)
    with pytest.raises(Crash):
        federation.serve()
    assert (ram_path / "run/parameters/round-00001.safetensors").exists()
    assert not (ram_path / "run/rounds.jsonl").exists()
    federation.serve()
    check(federation)


def test_the_goal_met_before_the_crash_closes_the_round_without_any_client(tiny_bundle, ram_path):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS | {"total": 1})
    for name in NAMES:
        federation.add(name)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and event.accepted == 3:
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    for client in federation.clients[:]:
        federation.broker.drop(client.transport)
        federation.clients.remove(client)
    assert federation.serve().rounds == 1
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 1))


def test_the_minimum_met_before_the_crash_is_enough_after_the_deadline(tiny_bundle, ram_path):
    rounds = {"total": 1, "goal": 3, "minimum": 2, "deadline_seconds": 30.0}
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=rounds)
    for name in ("a", "b"):
        federation.add(name)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and event.accepted == 2:
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    started = federation.clock.now
    federation.serve()
    assert 30 <= federation.clock.now - started < 40
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(["a", "b"], 1))


def test_an_update_made_before_the_crash_and_offered_after_it_counts(tiny_bundle, ram_path):
    """Trained while the coordinator was away: it comes back before anyone is invited again."""
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS | {"total": 1, "gather_seconds": 20.0})
    slow = []

    class Slow(ScriptedClient):
        def on_plan(self, plan):
            if not slow:
                slow.append(plan)
                raise Crash
            super().on_plan(plan)

    class Absent(ScriptedClient):
        """Not there until the others have been waiting for a while."""

        def act(self):
            if self.clock.now > back_at:
                super().act()

    back_at = 0.0
    federation.add("a", Slow)
    federation.add("b")
    federation.add("c", Absent)
    with pytest.raises(Crash):
        federation.serve()
    federation.clients[0].answer(slow[0])
    back_at = federation.clock.now + 10
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 1))
    for client in federation.clients:
        assert verdicts_of(client) == {1: True}


def test_after_a_restart_a_round_waits_for_all_who_come_back(tiny_bundle, ram_path):
    """With a minimum of one, the first to say hello must not start the round alone."""
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS | {"minimum": 1})
    for name in NAMES:
        federation.add(name)

    def observe(event):
        if isinstance(event, events.RoundEnded):
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    federation.serve()
    check(federation)


def test_a_name_belongs_to_its_first_key_also_after_a_crash(tiny_bundle, ram_path):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS | {"total": 1})
    owner = federation.add("a")
    federation.add("b")

    def observe(event):
        if isinstance(event, events.ClientJoined) and event.client == "b":
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    federation.clients.remove(owner)
    federation.broker.drop(owner.transport)

    class Thief(ScriptedClient):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.key = SigningKey(b"thief".ljust(32))

    thief = federation.add("a", Thief)
    owner = federation.add("a")
    federation.add("c")
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 1))
    assert thief.connection in {refusal.connection for refusal in thief.refusals}
    assert [verdict.accepted for verdict in owner.verdicts] == [True]


def test_an_interrupt_pauses_the_run_and_it_goes_on(tiny_bundle, ram_path):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.serve(observe)
    summary = json.loads((ram_path / "run/summary.json").read_bytes())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 1)
    federation.serve()
    check(federation)
    assert json.loads((ram_path / "run/summary.json").read_bytes())["status"] == "completed"


def test_a_run_that_is_over_stays_over(tiny_bundle, ram_path):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)
    federation.serve()
    before = final_parameters(federation)
    summary = federation.serve()
    assert (summary.status, summary.rounds) == ("completed", 3)
    np.testing.assert_array_equal(final_parameters(federation), before)
    check(federation)


def test_how_a_round_began_is_on_the_disk_before_any_update_is(tiny_bundle, ram_path, monkeypatch):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    directory = RunDirectory(federation.config, federation.bundle.manifest, federation.bundle.digest)
    synced, sync = [], os.fsync

    def fsync(file):
        sync(file)
        synced.append(Path(f"/proc/self/fd/{file}").readlink())

    monkeypatch.setattr(os, "fsync", fsync)
    collection = Collection(make_strategy("fedavg"), 4, {}, Limits(max_parameters=4), 1000)
    opened = RoundOpened(run=directory.run, round=1, nonce=bytes(16), parameters=bytes(32), salt=bytes(16))
    collection.open(directory, opened)
    journal = directory.journal_path(1)
    assert synced == []
    collection.invite(["a", "b"])
    collection.close()
    assert synced == [journal, journal.parent]
    assert [meta for meta, _ in read_journal(journal)] == [opened, Invited(clients=("a", "b"))]
    directory.close()


def test_a_journal_of_another_round_is_an_error(tiny_bundle, ram_path):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    directory = RunDirectory(federation.config, federation.bundle.manifest, federation.bundle.digest)
    journal = Journal(directory.journal_path(1))
    journal.append(RoundOpened(run=bytes(16), round=1, nonce=bytes(16), parameters=bytes(32)))
    journal.close()
    directory.close()
    with pytest.raises(RunError, match="not the journal of this run's round 1"):
        federation.serve()


def test_settings_that_no_longer_allow_what_was_accepted_are_an_error_that_loses_nothing(tiny_bundle, ram_path):
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)

    def observe(event):
        if isinstance(event, events.UpdateAccepted):
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    good = federation.config
    federation.config = msgspec.structs.replace(good, limits=msgspec.structs.replace(good.limits, max_examples=5))
    with pytest.raises(RunError, match=r"cannot be taken back: claims 10 examples.*settings"):
        federation.serve()
    federation.config = good
    federation.serve()
    check(federation)


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedadagrad", "fedyogi", "median", "geometric-median"])
def test_strategies_that_remember_go_on_to_the_bit(tiny_bundle, ram_path, strategy):
    """Momentum, second moments and tables of updates survive like sums do."""
    finals = []
    for name, crashes in (("whole", []), ("crashed", [9, 7, 13])):
        federation = ScriptedFederation(
            tiny_bundle, ram_path / name / "run", strategy=strategy, rounds={"total": 4, "goal": 3}
        )
        for client in NAMES:
            federation.add(client)
        for number in crashes:
            with pytest.raises(Crash):
                federation.serve(at_event(number))
        federation.serve()
        finals.append(final_parameters(federation))
    np.testing.assert_array_equal(*finals)
    assert not np.array_equal(finals[0], expected_parameters(NAMES, 4))


def accepted_and_then_killed(tiny_bundle, path, clients=NAMES):
    """A federation whose first coordinator ends with all but one update of round 1 in its journal."""
    federation = ScriptedFederation(tiny_bundle, path / "run", rounds=ROUNDS | {"total": 1, "goal": len(clients)})
    for name in clients:
        federation.add(name)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and event.accepted == len(clients) - 1:
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    return federation


def test_damage_to_the_first_record_costs_nothing(tiny_bundle, ram_path):
    """How the round was opened is noted a second time, in the database."""
    federation = accepted_and_then_killed(tiny_bundle, ram_path)
    path = ram_path / "run/journal/round-00001.journal"
    data = bytearray(path.read_bytes())
    data[25] ^= 0xFF
    path.write_bytes(data)
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 1))
    for client in federation.clients:
        assert verdicts_of(client) == {1: True}


def test_damage_in_the_middle_costs_the_damaged_update_only(tiny_bundle, ram_path, caplog):
    """The update that came after it stays in; the round is as if the damaged one had never come."""
    names = ["a", "b", "c", "d"]
    federation = accepted_and_then_killed(tiny_bundle, ram_path, names)
    path = ram_path / "run/journal/round-00001.journal"
    data = bytearray(path.read_bytes())
    order = [meta.client for meta, _ in read_journal(path) if isinstance(meta, UpdateAccepted)]
    position = data.find(order[1].encode(), data.find(b"accepted", data.find(b"accepted") + 1))
    data[position + 60] ^= 0xFF
    path.write_bytes(data)
    for client in federation.clients:
        client.pending = None if client.name == order[1] else client.pending
    federation.config = msgspec.structs.replace(
        federation.config, rounds=msgspec.structs.replace(federation.config.rounds, goal=3, minimum=3)
    )
    federation.serve()
    assert "are damaged: what they held is lost" in caplog.text
    left = [name for name in names if name != order[1]]
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(left, 1))


def test_a_journal_that_is_all_damage_is_an_error_that_loses_nothing(tiny_bundle, ram_path):
    federation = accepted_and_then_killed(tiny_bundle, ram_path)
    path = ram_path / "run/journal/round-00001.journal"
    data = path.read_bytes()
    path.write_bytes(bytes(10_000))
    with pytest.raises(RunError, match="nothing in its 10000 bytes is whole"):
        federation.serve()
    assert path.read_bytes() == bytes(10_000)
    path.write_bytes(data)
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 1))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_before_a_round_is_opened_gives_clients_the_same_parameters(tiny_bundle, ram_path, monkeypatch, number):
    """What was made for them and not yet given to anybody is made again, not made from."""
    vectors = []
    for name in ("whole", "crashed"):
        federation = ScriptedFederation(
            tiny_bundle, ram_path / name / "run", rounds=ROUNDS, downlink_codec="dense|int4:block=16"
        )
        for client in NAMES:
            federation.add(client)
        real = RunDirectory.note_opened

        def note_opened(self, opened, real=real):
            if opened.round == number:
                raise Crash
            real(self, opened)

        if name == "crashed":
            monkeypatch.setattr(RunDirectory, "note_opened", note_opened)
            with pytest.raises(Crash):
                federation.serve()
            monkeypatch.undo()
        federation.serve()
        vectors.append({plan.round: plan.vector for plan in federation.clients[0].plans})
    assert vectors[0] == vectors[1]
    assert len(set(vectors[0].values())) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_hears_of_acceptance_before_the_journal_is_synced(tiny_bundle, ram_path, monkeypatch, fails):
    """Although the coordinator goes on meanwhile; and nobody at all, if the disk does not take it."""
    log, commit, begin = [], Journal.commit, Post.begin

    def slow_commit(journal):
        log.append("begun")
        time.sleep(0.05)
        if fails and "verdicts begun" in log:
            raise RunError("the disk is full")
        commit(journal)
        log.append("synced")

    def noted_begin(post, messages):
        send = begin(post, messages)
        log.append("verdicts begun")
        return lambda: (log.append("verdicts"), send())

    monkeypatch.setattr(Journal, "commit", slow_commit)
    monkeypatch.setattr(Post, "begin", noted_begin)
    federation = ScriptedFederation(tiny_bundle, ram_path / "run", rounds=ROUNDS)
    for name in NAMES:
        federation.add(name)
    if fails:
        with pytest.raises(RunError, match="the disk is full"):
            federation.serve()
        federation.act()
        assert "verdicts" not in log
        assert not any(client.verdicts for client in federation.clients)
        return
    federation.serve()
    sent = [place for place, what in enumerate(log) if what == "verdicts"]
    assert sent
    for place in sent:
        assert log[:place].count("synced") == log[:place].count("begun") > 0
    assert all(verdicts_of(client) for client in federation.clients)

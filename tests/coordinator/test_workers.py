"""Aggregation workers: exact shares, and nothing lost when one of them dies."""

from __future__ import annotations

import json
import random

import msgspec
import numpy as np
import pytest
from tests.coordinator.test_coordinator import expected_parameters, final_parameters

from edgetrain.coordinator import events
from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.run.journal_reading import read_journal
from edgetrain.coordinator.run.segments import read_segment, segments_of
from edgetrain.coordinator.strategies import Contribution, Mergeable, make_strategy
from edgetrain.coordinator.workers import foreman, worker
from edgetrain.protocol.blobs import blob_ref, cut, make_chunk
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.training import TrainingConfig
from support.inline_crew import InlineCrew, SpreadFederation
from support.scripted import Crash, ScriptedClient

NAMES = ["a", "b", "c", "d", "e", "f"]
ROUNDS = {"total": 3, "goal": len(NAMES), "deadline_seconds": 60.0}

MERGEABLE = [
    "fedavg",
    "fedadam",
    {"name": "norm-bound", "max_norm": 0.5},
    "scaffold",
    "fednova",
    {"name": "dp-fedavg", "clip_norm": 0.3, "noise_multiplier": 1.0, "clients_per_round": 9},
]


def contribution(number, size=50):
    generator = np.random.default_rng(number)
    values = generator.normal(0, 1, (2, size)).astype(np.float32)
    return Contribution(
        f"c{number}", int(generator.integers(1, 100)), int(generator.integers(1, 9)),
        SparseOrDense(size, None, values[0]), training=TrainingConfig(), control=SparseOrDense(size, None, values[1]),
    )  # fmt: skip


@pytest.mark.parametrize("table", MERGEABLE, ids=lambda table: table if isinstance(table, str) else table["name"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shares_add_up_to_the_sum_of_all_to_the_bit(table, parts):
    strategy = make_strategy(table)
    whole = strategy.init(50, {})
    shares = [strategy.init(50, {}) for _ in range(parts)]
    for share in shares:
        share.share(parts)
    for number in random.Random(parts).sample(range(9), 9):
        whole = strategy.fold(whole, contribution(number))
        shares[number % parts] = strategy.fold(shares[number % parts], contribution(number))
    random.Random(1).shuffle(shares)
    merged = shares[0]
    for share in shares[1:]:
        merged.merge(share)
    if table == MERGEABLE[-1]:
        # Noise follows.
        assert merged.total.tobytes() == whole.total.tobytes()
        assert merged.balance == whole.balance
        return
    parameters = np.linspace(-1, 1, 50, dtype=np.float32)
    (expected, state), (found, after) = (strategy.finish(p, parameters, {}) for p in (whole, merged))
    assert found.tobytes() == expected.tobytes()
    assert {name: array.tobytes() for name, array in after.items()} == {
        name: array.tobytes() for name, array in state.items()
    }


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum"])
def test_what_compares_updates_has_no_shares(name):
    assert not isinstance(make_strategy(name).init(3, {}), Mergeable)


def test_shares_together_cannot_overflow():
    """2^29 is 2^59 in fixed point: fifteen of them and their rounding fit below 2^63, three into a quarter of it."""
    large = SparseOrDense(1, None, np.array([2.0**29], np.float32))

    def filled(parts):
        total = FixedPointSum(1)
        total.share(parts)
        with pytest.raises(UpdateRefused, match="too large"):
            for _ in range(100):
                total.add(large, 1)
        return total

    sums = [filled(4) for _ in range(4)]
    assert [total.count for total in sums] == [3, 3, 3, 3]
    merged = sums[0]
    for total in sums[1:]:
        merged.merge(total)
    assert merged.total[0] == 12 * 2**59
    assert filled(1).count == 15
    with pytest.raises(UpdateRefused, match="too large"):
        filled(1).merge(filled(1))


def federation_of(tiny_bundle, path, names=NAMES, kind=ScriptedClient, **settings):
    federation = SpreadFederation(tiny_bundle, path / "run", **({"rounds": ROUNDS} | settings))
    for name in names:
        federation.add(name, kind)
    return federation


def check(federation, names=NAMES, total=3):
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(names, total))
    assert [record["accepted"] for record in federation.records()] == [len(names)] * total
    rows = (federation.out / "clients.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[:3] for row in rows) == [
        [str(number), name, "accepted"] for number in range(1, total + 1) for name in sorted(names)
    ]
    for client in federation.clients:
        assert all(verdict.accepted for verdict in client.verdicts)
    assert not list((federation.out / "journal").iterdir())
    assert not list((federation.out / "uploads").glob("*/*"))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_result_is_that_of_a_single_process_to_the_bit(tiny_bundle, ram_path, workers):
    federation = federation_of(tiny_bundle, ram_path, workers=workers)
    federation.serve()
    check(federation)
    # All of them had something to do, and each update was taken once.
    assert {worker for worker, _ in InlineCrew.last.taken} == set(range(workers))
    assert sorted(client for _, client in InlineCrew.last.taken) == sorted(NAMES * 3)


class InPieces(ScriptedClient):
    """Its updates come in pieces of 100 bytes, some of them twice, in an order of its own."""

    def send_chunks(self, ref, update, ranges=()):
        chunks = list(cut(ref, update, ranges, chunk_bytes=100))
        order = random.Random(self.name)
        for chunk in order.sample(chunks, len(chunks)) + order.sample(chunks, len(chunks) // 2):
            self.send_raw(chunk, "blob")


def test_updates_in_pieces_reach_one_worker(tiny_bundle, ram_path):
    federation = federation_of(tiny_bundle, ram_path, kind=InPieces)
    federation.serve()
    check(federation)


class Impatient(ScriptedClient):
    """Sends everything three times."""

    def answer(self, plan, **changes):
        super().answer(plan, **changes)
        offer, update = self.pending
        for _ in range(2):
            self.send_chunks(offer.update, update)
            self.send(offer)


def test_what_comes_at_several_workers_counts_once(tiny_bundle, ram_path):
    federation = federation_of(tiny_bundle, ram_path, kind=Impatient)
    federation.serve()
    check(federation)


@pytest.mark.parametrize("kind", [ScriptedClient, InPieces])
@pytest.mark.parametrize("seed", range(1, 13))
def test_workers_that_die_at_any_point_lose_nothing(tiny_bundle, ram_path, seed, kind):
    federation = federation_of(tiny_bundle, ram_path, kind=kind, seed=seed, mortality=0.25)
    federation.serve()
    check(federation)
    assert InlineCrew.last.killed


@pytest.mark.parametrize("seed", range(8))
def test_nor_when_the_coordinator_dies_too(tiny_bundle, ram_path, seed):
    """Also with another number of workers afterwards, or none."""
    chance = random.Random(seed)
    federation = federation_of(tiny_bundle, ram_path, seed=seed, mortality=0.1)
    for _ in range(6):
        left = [chance.randrange(1, 25)]

        def observe(_event, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Crash

        workers = chance.choice(["inline:2", "inline:1", "inline:4", ""])
        federation.config = msgspec.structs.replace(federation.config, workers=workers)
        try:
            federation.serve(observe)
        except Crash:
            continue
        break
    else:
        federation.serve()
    check(federation)


def test_a_worker_dies_between_its_sync_and_its_report(tiny_bundle, ram_path):
    """Its updates are whole in its segment: they count, and nobody is asked for them again."""
    federation = federation_of(tiny_bundle, ram_path, rounds=ROUNDS | {"total": 1})
    killed = []

    def step():
        crew = InlineCrew.last
        if not crew.workers:
            return
        worker = crew.workers[0]
        worker.work(1000)
        if worker.worker._receipts and not killed:
            worker.worker._collection.commit()
            killed.extend(receipt.client for receipt in worker.worker._receipts)
            crew.kill(0)
            return
        crew.step()

    federation.act = lambda: ([client.act() for client in federation.clients], step())
    federation.serve()
    check(federation, total=1)
    assert killed
    assert not {client for _, client in InlineCrew.last.taken} & set(killed)


@pytest.mark.parametrize("accepted", [1, 3, 6])
def test_a_worker_that_hangs_is_ended(tiny_bundle, ram_path, accepted, caplog):
    """Also at the end of a round, when only its share is missing."""
    federation = federation_of(tiny_bundle, ram_path)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and (event.round, event.accepted) == (2, accepted):
            InlineCrew.last.hanging.add(0)

    federation.serve(observe)
    check(federation)
    assert InlineCrew.last.killed == 1
    assert "has said nothing for" in caplog.text


def test_the_segments_of_an_open_round_hold_every_update_once(tiny_bundle, ram_path):
    federation = federation_of(tiny_bundle, ram_path)

    def observe(event):
        if isinstance(event, events.UpdateAccepted) and event.accepted == 5:
            raise Crash

    with pytest.raises(Crash):
        federation.serve(observe)
    segments = segments_of(federation.out / "journal/round-00001.journal")
    assert sorted(segments) == [0, 1]
    opened, _ = next(read_journal(federation.out / "journal/round-00001.journal"))
    found = [meta.client for path in segments.values() for meta, _ in read_segment(path, opened)]
    assert len(found) >= 5
    assert len(set(found)) == len(found)
    federation.serve()
    check(federation)


def test_pieces_that_nobody_offers_take_no_memory(tiny_bundle, ram_path, monkeypatch):
    """The coordinator forgets the oldest of them, and so do its workers; honest clients are asked again."""
    monkeypatch.setattr(foreman, "MAX_UNCLAIMED", 50)
    held, in_workers = [], []

    class Flooding(ScriptedClient):
        def answer(self, plan, **changes):
            ref = blob_ref(bytes(4000))
            for number in range(300):
                self.send_raw(make_chunk(ref, number, bytes([1]) * 1000), "blob")
            super().answer(plan, **changes)

    hear = foreman.Foreman.hear

    def watched(self, said):
        hear(self, said)
        if self._round:
            held.append(sum(map(len, self._round.unclaimed.values())))
            in_workers.extend(each.worker._held for each in InlineCrew.last.workers.values())
            assert self._round.num_unclaimed == held[-1]

    monkeypatch.setattr(foreman.Foreman, "hear", watched)
    monkeypatch.setattr(worker, "HELD_BYTES", 20_000)
    federation = federation_of(tiny_bundle, ram_path, kind=Flooding)
    federation.serve()
    check(federation)
    assert 0 < max(held) <= 50
    assert 0 < max(in_workers) <= 20_000


class Hostile(ScriptedClient):
    """Sends what is no update, no chunk, or too much."""

    def answer(self, plan, **changes):
        self.answered.add(plan.nonce)
        update = b"\xe7\x01 not an update"
        offer = self.offer(plan, update)
        self.pending = (offer, update)
        self.send_raw(b"no chunk", "blob")
        self.send_raw(bytes((1 << 20) + 1), "blob")
        self.send(offer)
        self.send_chunks(offer.update, update)


def test_what_is_no_update_is_refused_and_costs_nothing(tiny_bundle, ram_path):
    federation = federation_of(tiny_bundle, ram_path, rounds=ROUNDS | {"minimum": len(NAMES), "goal": len(NAMES)})
    hostile = federation.add("hostile", Hostile)
    federation.config = msgspec.structs.replace(
        federation.config, rounds=msgspec.structs.replace(federation.config.rounds, over_selection=2.0)
    )
    federation.serve()
    np.testing.assert_array_equal(final_parameters(federation), expected_parameters(NAMES, 3))
    assert hostile.verdicts
    assert not any(verdict.accepted for verdict in hostile.verdicts)
    kinds = {event.kind for event in federation.seen if isinstance(event, events.Refused)}
    assert {"malformed", "oversize", "bad_update"} <= kinds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": "inline:0"}, "not usable"),
        ({"workers": "threads:2"}, "not usable"),
        ({"workers": "inline:2", "strategy": "median", "codec": "dense|float32"}, "all updates at one place"),
        ({"workers": "inline:2", "strategy": "fedbuff"}, "asynchronous"),
    ],
)
def test_settings_that_workers_cannot_work_in_are_refused(tiny_bundle, ram_path, settings, message):
    federation = federation_of(tiny_bundle, ram_path)
    federation.config = msgspec.structs.replace(federation.config, **settings)
    with pytest.raises(ConfigError, match=message):
        federation.serve()


def test_workers_that_always_die_end_the_run_with_a_reason(tiny_bundle, ram_path):
    federation = federation_of(tiny_bundle, ram_path, seed=1, mortality=1.0)
    with pytest.raises(RunError, match="killed by the test"):
        federation.serve()
    InlineCrew.mortality = 0.0
    federation.serve()
    check(federation)
    assert json.loads((federation.out / "summary.json").read_bytes())["rounds"] == 3

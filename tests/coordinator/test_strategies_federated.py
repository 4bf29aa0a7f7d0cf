"""Strategies in a whole federation: real coordinator, real clients, the broker in memory."""

import json
import threading

import numpy as np
import pytest

from edgetrain.coordinator import events
from edgetrain.coordinator.config import EvaluationConfig, RoundsConfig
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.rounds.adaptation import DeviceRule
from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.rounds.selection import SelectionConfig
from edgetrain.coordinator.rounds.state import OUTSTANDING
from edgetrain.coordinator.run.requests import write_request
from edgetrain.edge_client.rounds import Rounds
from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.groups import elements_of
from edgetrain.protocol.training import TrainingConfig
from edgetrain.simulation import SimulationConfig, simulate
from support.in_memory import Federation, shards
from support.tiny_bundle import make_data, write_tiny_bundle

# Whole shards as batches: the order of the samples does not matter then.
TRAINING = TrainingConfig(epochs=2, batch_size=64, learning_rate=0.5)
SIZES = (24, 12, 20)
DEFAULTS = {
    "rounds": RoundsConfig(total=3, goal=3, deadline_seconds=20),
    "training": TRAINING,
    "codec": "dense|float32",
    "downlink_codec": "dense|float32",
    "evaluation": EvaluationConfig(by_clients=False),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def federation(tmp_path, bundle):
    made = Federation(tmp_path, bundle, shards(SIZES))
    yield made
    made.close()


def run(federation, **settings):
    coordinator = federation.coordinator(**(DEFAULTS | settings))
    federation.start()
    summary = coordinator.run()
    federation.finish()
    return coordinator, summary


def simulated(bundle, config):
    session = open_session(Bundle(bundle))
    *_, last = simulate(
        session,
        Bundle(bundle).initial_parameters(),
        [Dataset(*shard) for shard in shards(SIZES)],
        Dataset(*make_data(8, seed=9)),
        config,
    )
    return last.parameters


@pytest.mark.parametrize(
    "strategy",
    [
        "fedavg",
        "fedsgd",
        {"name": "fedprox", "mu": 0.5},
        "fednova",
        "scaffold",
        {"name": "fedadam", "inner": "median"},
        "geometric-median",
    ],
)
def test_a_federation_computes_what_the_simulation_computes(federation, bundle, strategy):
    coordinator, summary = run(federation, strategy=strategy)
    assert (summary.rounds, summary.updates) == (3, 9)
    expected = simulated(bundle, SimulationConfig(rounds=3, clients_per_round=3, training=TRAINING, strategy=strategy))
    # The samples of a batch are in another order: float32 sums differ in the last bits.
    np.testing.assert_allclose(coordinator._parameters, expected, rtol=2e-3, atol=2e-5)
    assert np.abs(expected - Bundle(bundle).initial_parameters()).max() > 0.01


def test_scaffold_survives_a_restart(federation):
    """What the strategy remembers is on disk with its round; the devices keep theirs."""
    first = federation.coordinator(**(DEFAULTS | {"strategy": "scaffold"}))
    federation.start()
    first.run()
    federation.finish()
    state = first._server_state
    federation.reopen()
    again = federation.coordinator(
        **(DEFAULTS | {"strategy": "scaffold", "rounds": RoundsConfig(total=5, goal=3, deadline_seconds=20)})
    )
    assert set(state) == {"scaffold/control_sum", "scaffold/members"} == set(again._server_state)
    assert all(np.array_equal(state[key], again._server_state[key]) for key in state)
    federation.start()
    again.run()
    federation.finish()
    # The server's sum is the sum of the clients' own control variates.
    own = [client._rounds._control.vector.astype(np.float64) for client in federation.clients.values()]
    np.testing.assert_allclose(again._server_state["scaffold/control_sum"], sum(own), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("codec", ["topk:0.2|int8", "dense|int4"])
def test_compressed_control_variates_stay_the_mean_of_the_clients(federation, codec):
    settings = {"strategy": "scaffold", "codec": codec, "downlink_codec": "dense|int8"}
    coordinator, _ = run(federation, **settings)
    own = [client._rounds._control.vector.astype(np.float64) for client in federation.clients.values()]
    assert max(np.abs(vector).max() for vector in own) > 0.01
    state = coordinator._server_state
    np.testing.assert_allclose(state["scaffold/control_sum"], sum(own), rtol=1e-4, atol=1e-6)


def test_a_damaged_server_state_is_an_error(federation):
    run(federation, strategy="fedavgm")
    path = federation.directory / "run" / "strategy" / "round-00003.safetensors"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="is not what round 3 wrote"):
        federation.coordinator(**(DEFAULTS | {"strategy": "fedavgm"}))
    path.unlink()
    federation.close_directories()
    with pytest.raises(RunError, match="cannot read what the strategy remembers"):
        federation.coordinator(**(DEFAULTS | {"strategy": "fedavgm"}))


def test_senseless_settings_are_refused_before_anything_starts(federation):
    with pytest.raises(ConfigError, match="dense codec"):
        federation.coordinator(**(DEFAULTS | {"strategy": "median", "codec": "topk:0.1|int8"}))
    federation.close_directories()
    rule = DeviceRule(client="client-1", codec="topk:0.1|int8")
    with pytest.raises(ConfigError, match="dense codec"):
        federation.coordinator(**(DEFAULTS | {"strategy": "median", "devices": (rule,)}))


# --- personalization ---------------------------------------------------------------------------------


def test_personal_parameters_never_leave_the_device(federation, bundle):
    coordinator, _ = run(federation, personal=("second.*",), codec="dense|float32")
    manifest, initial = Bundle(bundle).manifest, Bundle(bundle).initial_parameters()
    mask = elements_of(manifest, ("second.*",))
    np.testing.assert_array_equal(coordinator._parameters[mask], initial[mask])
    assert (coordinator._parameters[~mask] != initial[~mask]).all()
    own = [client._workplace._personal._values for client in federation.clients.values()]
    for values in own:
        assert np.abs(values - initial[mask]).max() > 0.01
    assert not np.array_equal(own[0], own[1])


def test_an_unknown_personal_group_is_refused(federation):
    with pytest.raises(ConfigError, match=r"'third\.\*' is no parameter"):
        federation.coordinator(**(DEFAULTS | {"personal": ("third.*",)}))


# --- heterogeneous clients ---------------------------------------------------------------------------


def test_weak_devices_get_less_to_do(federation):
    rules = (
        DeviceRule(client="client-0", epochs=1, codec="dense|int8"),
        DeviceRule(examples_up_to=12, max_steps=1),
    )
    run(federation, devices=rules, strategy="fednova", rounds=RoundsConfig(total=1, goal=3))
    rows = (federation.directory / "run" / "clients.csv").read_text().splitlines()
    names = rows[0].split(",")
    seen = {row["client"]: row for row in (dict(zip(names, line.split(","), strict=True)) for line in rows[1:])}
    assert {name: int(row["steps"]) for name, row in seen.items()} == {
        "client-0": 1,
        "client-1": 1,
        "client-2": 2,
    }
    assert int(seen["client-0"]["update_bytes"]) < int(seen["client-2"]["update_bytes"]) / 2


# --- asynchronous ------------------------------------------------------------------------------------


def test_buffered_clients_do_not_wait_for_each_other(federation, monkeypatch):
    """One client is slow: the others fill buffers of two meanwhile, and its stale update counts."""
    slow = federation.clients["client-2"]
    train = Rounds.train
    release = threading.Event()

    def late(rounds, plan):
        if rounds is slow._rounds:
            release.wait(20)
        train(rounds, plan)

    monkeypatch.setattr(Rounds, "train", late)
    closed = []

    def observe(event):
        if isinstance(event, events.RoundEnded):
            closed.append(event.record.round)
            if event.record.round == 3:
                release.set()

    staleness = []
    strategy_fold = fold_spy(monkeypatch, staleness)
    run(
        federation,
        strategy="fedbuff",
        rounds=RoundsConfig(total=15, goal=2, deadline_seconds=20, gather_seconds=5),
        observe=observe,
    )
    assert closed == list(range(1, 16))
    late_ones = [(client, age) for client, age in strategy_fold if client == "client-2"]
    assert late_ones
    assert late_ones[0][1] >= 2
    assert all(age == 0 for client, age in strategy_fold[:2])


def fold_spy(monkeypatch, seen):
    """Notes who was folded, and how stale."""
    original = Collection._fold

    def fold(self, client, offer, data, training):
        row = original(self, client, offer, data, training)
        seen.append((client, self._round - offer.round))
        return row

    monkeypatch.setattr(Collection, "_fold", fold)
    return seen


def test_concurrency_bounds_how_many_work_at_once(federation):
    most = 0

    rounds = RoundsConfig(total=4, goal=2, deadline_seconds=20, gather_seconds=5, concurrency=1)
    coordinator = federation.coordinator(**(DEFAULTS | {"strategy": "fedbuff", "rounds": rounds}))
    invite = coordinator._invite_free

    def counted(current):
        nonlocal most
        invite(current)
        most = max(most, current.state.count(*OUTSTANDING))

    coordinator._invite_free = counted
    federation.start()
    summary = coordinator.run()
    federation.finish()
    assert summary.rounds == 4
    assert most == 1


# --- rounds ------------------------------------------------------------------------------------------


def test_one_who_stays_away_is_banned_and_comes_back(federation, monkeypatch):
    absent = federation.clients["client-1"]
    train = Rounds.train

    def stay_away(rounds, plan):
        if rounds is absent._rounds:
            absent._mail.wait(lambda: plan.nonce in absent._mail.closed)
        else:
            train(rounds, plan)

    def observe(event):
        # All others have done their part: the deadline passes.
        if isinstance(event, events.UpdateAccepted) and event.accepted == 2:
            federation.leap(60.0)

    monkeypatch.setattr(Rounds, "train", stay_away)
    run(
        federation,
        rounds=RoundsConfig(total=5, goal=3, minimum=2, deadline_seconds=60.0),
        selection=SelectionConfig(ban_after=1, ban_rounds=2),
        observe=observe,
    )
    invited = [
        json.loads(line)["invited"] for line in (federation.directory / "run" / "rounds.jsonl").read_text().splitlines()
    ]
    # Spoils round 1, sits out 2 and 3, spoils round 4, sits out 5.
    assert invited == [3, 2, 2, 3, 2]


def test_clients_that_are_not_needed_leave_and_come_back(federation):
    """Three clients, one per round: whoever has trained goes away for a while."""
    coordinator, summary = run(
        federation,
        rounds=RoundsConfig(total=6, goal=1, deadline_seconds=20, pace_seconds=0.001),
        selection=SelectionConfig(method="round-robin"),
    )
    assert summary.rounds == 6
    assert len(federation.pauses) >= 3
    # Whoever was away when the run ended came back, saw it, and left.
    longest = max(record.seconds for record in coordinator._directory.records)
    assert all(0.001 <= pause <= 2 * longest for pause in federation.pauses)


def test_a_buffered_run_goes_on_after_a_stop(federation):
    settings = DEFAULTS | {"strategy": "fedbuff", "codec": "topk:0.3|int8"}

    def stop_after_three(event):
        if isinstance(event, events.RoundEnded) and event.record.round == 3:
            write_request(federation.directory / "run", "stop")

    rounds = RoundsConfig(total=8, goal=2, deadline_seconds=20, gather_seconds=5)
    first = federation.coordinator(observe=stop_after_three, **(settings | {"rounds": rounds}))
    federation.start()
    assert first.run().status == "stopped"
    federation.finish()
    federation.reopen()
    again = federation.coordinator(**(settings | {"rounds": rounds}))
    federation.start()
    summary = again.run()
    federation.finish()
    assert (summary.status, summary.rounds) == ("completed", 8)
    # Those that arrive together may overfill a buffer.
    assert all(2 <= record.accepted <= 3 for record in again._directory.records)

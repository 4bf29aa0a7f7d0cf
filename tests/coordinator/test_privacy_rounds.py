"""A federation under a budget: no round starts that it cannot pay for, whatever happened before."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from scipy import stats
from tests.coordinator.test_coordinator import final_parameters

from edgetrain.coordinator import events
from edgetrain.coordinator.config import RoundsConfig
from edgetrain.coordinator.privacy.config import PrivacyConfig
from edgetrain.coordinator.privacy.lottery import Lottery
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Round
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.strategies import Private
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.privacy import Keystream, PrivacyError, Release, spent
from support.scripted import Crash, ScriptedClient, ScriptedFederation

DELTA = 1e-6
NAMES = ["a", "b", "c"]


def dp(noise_multiplier=2.0, **options):
    return {"name": "dp-fedavg", "clip_norm": 0.5, "noise_multiplier": noise_multiplier,
            "clients_per_round": 3} | options  # fmt: skip


def epsilon_of(rounds, noise_multiplier=2.0):
    return spent([Release(mechanism="gaussian", noise_multiplier=noise_multiplier, steps=rounds)], DELTA).epsilon


def federation(bundle, path, *, budget_rounds=3, total=10, out="run", **settings):
    """A budget that is enough for `budget_rounds` rounds and a little."""
    budget = PrivacyConfig(epsilon=epsilon_of(budget_rounds) * 1.001, delta=DELTA)
    made = ScriptedFederation(bundle, path / out, **{
        "rounds": {"total": total, "goal": 3}, "strategy": dp(), "privacy": budget,
    } | settings)  # fmt: skip
    for name in NAMES:
        made.add(name, Clipping)
    return made


class Clipping(ScriptedClient):
    """Does what its plan says about clipping."""

    def answer(self, plan, **changes):
        assert plan.training.max_delta_norm == 0.5
        super().answer(plan, **{"unclipped": False} | changes)


def set_config(made, **changes):
    made.config = msgspec.structs.replace(made.config, **changes)


def ledger(path):
    return json.loads((path / "privacy-f.json").read_bytes())


def test_the_round_that_would_overspend_does_not_start(tiny_bundle, ram_path):
    made = federation(tiny_bundle, ram_path)
    summary = made.serve()
    records = made.records()
    assert [record["epsilon"] for record in records] == pytest.approx([epsilon_of(n) for n in (1, 2, 3)])
    assert summary.epsilon == pytest.approx(epsilon_of(3))
    assert summary.delta == DELTA
    assert summary.status == "completed"
    assert summary.reason.startswith("round 4 was refused before it started: the privacy budget does not allow it")
    assert max(plan.round for client in made.clients for plan in client.plans) == 3
    assert not (made.out / "journal/round-00004.journal").exists()
    assert ledger(ram_path)["releases"][0]["steps"] == 3
    assert ledger(ram_path)["participants"] == {name: [3] for name in NAMES}


def test_nor_after_a_restart_nor_in_another_run_of_the_federation(tiny_bundle, ram_path):
    made = federation(tiny_bundle, ram_path)
    made.serve()
    assert made.serve().reason.startswith("round 4 was refused")
    set_config(made, out=str(ram_path / "second"))
    made.out = ram_path / "second"
    assert made.serve().reason.startswith("round 1 was refused")
    assert not (made.out / "rounds.jsonl").exists()


@pytest.mark.parametrize("noise_multiplier", [1.0, 1.9, 4.0])
def test_nor_with_other_noise(tiny_bundle, ram_path, noise_multiplier):
    made = federation(tiny_bundle, ram_path, total=1)
    made.serve()
    set_config(made, strategy=dp(noise_multiplier), rounds=RoundsConfig(total=30, goal=3))
    summary = made.serve()
    first = Release(mechanism="gaussian", noise_multiplier=2.0)
    then = lambda n: Release(mechanism="gaussian", noise_multiplier=noise_multiplier, steps=n)
    affordable = [n for n in range(1, 30) if spent([first, then(n)], DELTA).epsilon <= made.config.privacy.epsilon]
    assert len(made.records()) == 1 + max(affordable, default=0)
    assert summary.epsilon <= made.config.privacy.epsilon


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"privacy": PrivacyConfig(epsilon=100.0, delta=DELTA)}, PrivacyError, "can be tightened, not loosened"),
        ({"strategy": "fedavg", "privacy": PrivacyConfig()}, PrivacyError, "would break its promise"),
        ({"strategy": "fedavg"}, ConfigError, "adds no noise"),
        ({"privacy": PrivacyConfig()}, ConfigError, "needs a budget"),
    ],
)
def test_settings_that_would_get_around_it_are_refused(tiny_bundle, ram_path, changes, error, message):
    made = federation(tiny_bundle, ram_path, total=1)
    made.serve()
    set_config(made, **changes)
    with pytest.raises(error, match=message):
        made.serve()


def test_a_ledger_that_is_gone_is_missed(tiny_bundle, ram_path):
    made = federation(tiny_bundle, ram_path, total=1)
    made.serve()
    (ram_path / "privacy-f.json").unlink()
    set_config(made, rounds=RoundsConfig(total=3, goal=3))
    with pytest.raises(PrivacyError, match="knows of fewer private rounds than the 1"):
        made.serve()


@pytest.mark.parametrize("number", range(1, 22, 2))
def test_wherever_it_crashes_it_never_overspends(tiny_bundle, ram_path, number):
    made = federation(tiny_bundle, ram_path)
    seen = []

    def observe(event):
        seen.append(event)
        if len(seen) == number:
            raise Crash

    for _ in range(12):
        try:
            made.serve(observe)
            break
        except Crash:
            seen.clear()
    else:
        # It cannot get on, since every life ends at the same event; then without crashes.
        made.serve()
    spent_rounds = ledger(ram_path)["releases"][0]["steps"]
    assert spent_rounds <= 3
    assert len(made.records()) <= spent_rounds
    assert all(record["epsilon"] <= made.config.privacy.epsilon for record in made.records())


def test_a_crash_between_the_noise_and_the_record_is_paid_twice(tiny_bundle, ram_path, monkeypatch):
    """The evaluation of the noisy parameters may have been seen: the second noise is a second release."""
    made = federation(tiny_bundle, ram_path)

    def crash(*_arguments, **_named):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(RunDirectory, "close_round", crash)
        made.serve()
    assert ledger(ram_path)["releases"][0]["steps"] == 1
    assert not (made.out / "rounds.jsonl").exists()
    made.serve()
    assert ledger(ram_path)["releases"][0]["steps"] == 3
    assert len(made.records()) == 2
    assert made.records()[0]["epsilon"] == pytest.approx(epsilon_of(2))


def test_the_parameters_are_the_mean_of_clipped_deltas_and_noise(tiny_bundle, ram_path):
    made = federation(tiny_bundle, ram_path, total=1, budget_rounds=1)
    made.serve()
    clients = {client.name: client for client in made.clients}
    plan = clients["a"].plans[0]
    deltas = [clients[name].delta(plan).astype(np.float64) for name in NAMES]
    clipped = [delta * min(1.0, 0.5 / np.linalg.norm(delta)) for delta in deltas]
    expected = made.bundle.initial_parameters() + sum(clipped) / 3
    noise = (final_parameters(made) - expected) / (2.0 * 0.5 / 3)
    assert stats.kstest(noise, "norm").pvalue > 1e-4


def test_two_runs_have_different_noise(tiny_bundle, ram_path):
    (ram_path / "x").mkdir()
    (ram_path / "y").mkdir()
    one, other = federation(tiny_bundle, ram_path / "x", total=1), federation(tiny_bundle, ram_path / "y", total=1)
    one.serve()
    other.serve()
    assert (final_parameters(one) != final_parameters(other)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": {"method": "utility"}}, "selection.method"),
        ({"stop": {"metric": "clients.accuracy"}}, "stop.metric"),
        ({"stop": {"metric": "train_loss"}}, "stop.metric"),
        ({"rounds": {"goal": 3, "over_selection": 2.0}, "strategy": dp(sampling="poisson", population=9)},
         "over_selection"),
        ({"privacy": {"epsilon": 1.0, "accountant": "none-such"}}, "accountant"),
    ],
)  # fmt: skip
def test_what_would_leak_around_the_noise_is_refused(tiny_bundle, ram_path, settings, message):
    from edgetrain.coordinator.config import FederationConfig
    from edgetrain.protocol.config import convert

    made = federation(tiny_bundle, ram_path)
    tables = msgspec.to_builtins(made.config) | settings
    with pytest.raises(ConfigError, match=message):
        made.config = convert(tables, FederationConfig, where="settings")
        made.serve()


# --- chance ------------------------------------------------------------------------------------------


def open_round(goal):
    class Empty:
        was_invited = False

    return OpenRound(Round(1, b"n" * 16, goal, 1, 0.0), Empty(), b"", None, ())


def draws(release, population, names, rounds, goal):
    lottery = Lottery(Private(release, lambda _state: 1.0, population), random_bytes=Keystream(b"k" * 32))
    drawn = []
    for _ in range(rounds):
        current = open_round(goal)
        drawn.append(lottery.invite(current, names))
        assert current.state.goal == len(drawn[-1])
        # Asked again, e.g. in a second attempt with fewer of them there: the same, nobody new.
        assert set(lottery.invite(current, names[::2])) == set(drawn[-1]) & set(names[::2])
    return drawn


def test_poisson_rounds_are_coins_of_each_client():
    release = Release(mechanism="gaussian", noise_multiplier=1.0, sampling="poisson", sampling_rate=0.2)
    names = [f"c{number:02d}" for number in range(30)]
    drawn = draws(release, 50, names, 2000, 10)
    sizes = [len(one) for one in drawn]
    assert abs(np.mean(sizes) - 6.0) < 5 * np.sqrt(30 * 0.16 / 2000)
    assert stats.chisquare([sum(name in one for one in drawn) for name in names]).pvalue > 1e-4


def test_fixed_rounds_leave_the_places_of_the_absent_empty():
    release = Release(mechanism="gaussian", noise_multiplier=1.0, sampling="fixed", sampling_rate=0.2)
    names = [f"c{number:02d}" for number in range(25)]
    drawn = draws(release, 50, names, 2000, 10)
    sizes = np.array([len(one) for one in drawn])
    # Hypergeometric: 10 of 50 places, 25 of them taken: mean 5, variance 10 * 1/4 * 40/49.
    assert abs(sizes.mean() - 5) < 5 * np.sqrt(2.04 / 2000)
    assert 1.7 < sizes.var() < 2.4
    with pytest.raises(ConfigError, match="population is 20, but 25"):
        draws(release, 20, names, 1, 4)


def test_a_federation_by_chance_runs_and_waits_for_those_who_were_drawn(tiny_bundle, ram_path):
    made = federation(
        tiny_bundle, ram_path, budget_rounds=50, total=12, strategy=dp(sampling="poisson", population=6),
        rounds={"total": 12, "goal": 3, "gather_seconds": 5.0},
    )  # fmt: skip
    for name in ("d", "e", "f"):
        made.add(name, Clipping)
    summary = made.serve()
    assert summary.rounds == 12
    sizes = [record["accepted"] for record in made.records()]
    assert sizes == [record["invited"] for record in made.records()]
    # 12 rounds of 6 coins of 1/2: all alike, or all 3, has a probability below 1e-5.
    assert len(set(sizes)) > 1
    release = Release(mechanism="gaussian", noise_multiplier=2.0, sampling="poisson", sampling_rate=0.5, steps=12)
    assert summary.epsilon == pytest.approx(spent([release], DELTA).epsilon)


def test_who_was_drawn_before_a_crash_is_drawn_after_it(tiny_bundle, ram_path):
    made = federation(
        tiny_bundle, ram_path, budget_rounds=50, total=1, strategy=dp(sampling="fixed", population=6),
        rounds={"total": 1, "goal": 3},
    )  # fmt: skip
    for name in ("d", "e", "f"):
        made.add(name, Clipping)

    def observe(event):
        if isinstance(event, events.UpdateAccepted):
            raise Crash

    with pytest.raises(Crash):
        made.serve(observe)
    invited = {client.name for client in made.clients if client.plans}
    made.serve()
    assert {client.name for client in made.clients if client.plans} == invited
    assert made.records()[0]["accepted"] == len(invited) == 3

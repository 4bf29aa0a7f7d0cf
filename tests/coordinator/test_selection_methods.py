"""Who is invited, by every method."""

import msgspec
import numpy as np
import pytest

from edgetrain.coordinator.clients.history import ClientHistory, History
from edgetrain.coordinator.config import RoundsConfig
from edgetrain.coordinator.rounds.deadlines import deadline_seconds
from edgetrain.coordinator.rounds.pace import come_back_seconds
from edgetrain.coordinator.rounds.selection import (
    Candidate,
    SelectionConfig,
    admitted,
    banned,
    oort_utility,
    select,
    unfit,
)
from edgetrain.coordinator.rounds.state import Outcome, Part, Round
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.edge_client.host.device import device_state, is_news
from edgetrain.protocol.messages import DeviceState


def crowd(count=8, **columns):
    return [Candidate(f"c{i}", **{name: values[i] for name, values in columns.items()}) for i in range(count)]


def draw(config, candidates, count, rounds=400):
    """How often each is chosen."""
    hits = dict.fromkeys((candidate.name for candidate in candidates), 0)
    for number in range(rounds):
        for name in select(config, candidates, count, seed=1, round_number=number, attempt=1):
            hits[name] += 1
    return np.array(list(hits.values())) / rounds


@pytest.mark.parametrize("method", ["random", "examples", "round-robin", "utility"])
def test_a_choice_has_the_right_size_and_can_be_repeated(method):
    config = SelectionConfig(method=method)
    past = [ClientHistory(accepted=i % 3, last_round=i, loss=float(i) if i % 2 else None) for i in range(8)]
    people = crowd(past=past)
    chosen = select(config, people, 3, seed=5, round_number=9, attempt=2)
    assert len(set(chosen)) == 3
    assert chosen == sorted(chosen) == select(config, people, 3, seed=5, round_number=9, attempt=2)
    assert len(select(config, people, 20, seed=5, round_number=9, attempt=2)) == 8
    assert select(config, [], 3, seed=5, round_number=9, attempt=2) == []


def test_random_is_uniform():
    np.testing.assert_allclose(draw(SelectionConfig(), crowd(), 2), 0.25, atol=0.08)


def test_all_invites_everyone():
    assert draw(SelectionConfig(method="all"), crowd(), 2).tolist() == [1.0] * 8


def test_examples_draws_in_proportion():
    people = crowd(4, num_examples=[1, 2, 3, 4])
    shares = draw(SelectionConfig(method="examples"), people, 1, rounds=3000)
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.03)


def test_round_robin_lets_everyone_take_part_equally():
    history, config = History(), SelectionConfig(method="round-robin")
    for number in range(1, 9):
        people = [Candidate(f"c{i}", past=history.of(f"c{i}")) for i in range(8)]
        chosen = select(config, people, 3, seed=1, round_number=number, attempt=1)
        history.add(ClientRow(round=number, client=name, status="accepted") for name in chosen)
        counts = [history.of(f"c{i}").accepted for i in range(8)]
        assert max(counts) - min(counts) <= 1
    assert counts == [3] * 8


# --- Oort --------------------------------------------------------------------------------------------


def test_utility_is_the_papers():
    slow = Candidate("c", 50, past=ClientHistory(accepted=1, last_round=4, loss=0.5, seconds=20.0))
    statistical = 50 * 0.5 + (0.1 * np.log(10) / 4) ** 0.5
    assert oort_utility(slow, 10, 40.0, 2.0) == pytest.approx(statistical)
    assert oort_utility(slow, 10, 10.0, 2.0) == pytest.approx(statistical / 4)


def test_utility_prefers_high_loss_and_explores_the_unseen():
    losses = [5.0, 4.9, 0.1, 0.1, 0.1, 0.1, None, None]
    past = [
        ClientHistory() if loss is None else ClientHistory(accepted=1, last_round=1, loss=loss, seconds=1.0)
        for loss in losses
    ]
    config = SelectionConfig(method="utility", exploration=0.34)
    shares = draw(config, crowd(past=past), 3)
    # Two by utility, one of the unseen.
    np.testing.assert_allclose(shares[:2], 1)
    assert shares[2:6].max() == 0
    assert shares[6:].min() > 0.4


# --- conditions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "state", "reason"),
    [
        ({"min_battery_percent": 30}, {"battery_percent": 20.0}, "battery at 20 %"),
        ({"min_battery_percent": 30}, {"battery_percent": 20.0, "charging": True}, None),
        ({"min_battery_percent": 30}, {"battery_percent": 40.0}, None),
        ({"min_battery_percent": 30}, {}, None),
        ({"only_charging": True}, {"charging": False}, "not charging"),
        ({"only_charging": True}, {}, None),
        ({"networks": ("wifi", "ethernet")}, {"network": "cellular"}, "on cellular"),
        ({"networks": ("wifi",)}, {"network": "wifi"}, None),
        ({"networks": ("wifi",)}, {}, None),
        ({"min_free_memory_mb": 100}, {"free_memory_mb": 99}, "99 MB of memory free"),
        ({"max_temperature_c": 70}, {"temperature_c": 80.5}, "80 degrees"),
        ({}, {"battery_percent": 1.0, "temperature_c": 99.0}, None),
    ],
)
def test_conditions_on_the_device(config, state, reason):
    assert unfit(SelectionConfig(**config), DeviceState(**state)) == reason


def spoil(history, number, client="c0", status="lost", failed=True):
    history.add([ClientRow(round=number, client=client, status=status, failed=failed)])


def test_bans_begin_after_failures_in_a_row_and_end():
    config, history = SelectionConfig(ban_after=2, ban_rounds=3), History()
    spoil(history, 1)
    history.add([ClientRow(round=2, client="c0", status="accepted")])
    spoil(history, 3)
    assert not banned(config, history.of("c0"), 4)
    spoil(history, 4, status="declined", failed=False)
    assert not banned(config, history.of("c0"), 5)
    spoil(history, 5)
    assert [banned(config, history.of("c0"), number) for number in (6, 7, 8, 9)] == [True] * 3 + [False]
    assert banned(SelectionConfig(ban_after=2, ban_rounds=0), history.of("c0"), 1000)
    assert not banned(SelectionConfig(), history.of("c0"), 6)


def test_bans_give_way_before_a_round_fails_but_conditions_do_not():
    config = SelectionConfig(ban_after=1, min_battery_percent=50)
    failed = ClientHistory(failures=1, failed_round=1)
    people = [
        Candidate("a"),
        Candidate("b", past=failed),
        Candidate("c", state=DeviceState(battery_percent=10.0)),
    ]
    names = [[c.name for c in admitted(config, people, round_number=2, least=n)] for n in (1, 2, 3)]
    assert names == [["a"], ["a", "b"], ["a", "b"]]


# --- deadlines ---------------------------------------------------------------------------------------


def test_the_deadline_follows_what_was_observed():
    config = RoundsConfig(deadline_seconds=100, adaptive_deadline=True, deadline_quantile=0.5, deadline_margin=2)
    assert deadline_seconds(config, [10, 11, 12], 1) == 100
    assert deadline_seconds(config, [8, 10, 12, 90], 1) == 22
    assert deadline_seconds(config, [8, 10, 12, 90], 2) == 100
    assert deadline_seconds(config, [0.1] * 4, 1) == config.min_deadline_seconds
    assert deadline_seconds(config, [500] * 4, 1) == 100
    assert deadline_seconds(RoundsConfig(deadline_seconds=100), [1] * 9, 1) == 100


def test_grace_is_for_those_whose_bytes_arrive():
    state = Round(1, bytes(16), goal=2, minimum=1, deadline_at=10.0, grace_seconds=5.0)
    for name in "ab":
        state.invite(name)
    state.advance("a", Part.ACCEPTED)
    assert state.outcome(11.0) is Outcome.CLOSED
    state.advance("b", Part.COLLECTING)
    assert state.outcome(14.9) is Outcome.OPEN
    assert state.outcome(15.0) is Outcome.CLOSED


# --- pace --------------------------------------------------------------------------------------------


def pace(client="c", population=100, per_round=10, round_seconds=60.0, at_least=60.0):
    return come_back_seconds(
        population=population,
        per_round=per_round,
        round_seconds=round_seconds,
        at_least=at_least,
        client=client,
        round_number=3,
    )


def test_clients_come_back_spread_out_before_they_are_needed():
    # Invited every 10 rounds of a minute: away for 4.5 to 9 minutes.
    waits = [pace(f"c{number}") for number in range(500)]
    assert min(waits) >= 270
    assert max(waits) <= 540
    assert np.mean(waits) == pytest.approx(405, rel=0.03)
    assert pace("c7") == pace("c7")


def test_small_populations_and_short_absences_stay():
    assert pace(population=10) == 0.0
    assert pace(population=11) == 0.0
    assert pace(round_seconds=0.0) == 0.0


# --- what a device says of itself --------------------------------------------------------------------


def test_a_device_tells_what_matters_and_no_more():
    told = DeviceState(battery_percent=50.0, charging=False, network="wifi", free_memory_mb=400, temperature_c=40.0)
    for change in (
        {"battery_percent": 54.0},
        {"free_memory_mb": 310},
        {"temperature_c": 44.0},
        {},
    ):
        assert not is_news(told, msgspec.structs.replace(told, **change)), change
    for change in (
        {"battery_percent": 56.0},
        {"charging": True},
        {"network": "cellular"},
        {"free_memory_mb": 290},
        {"temperature_c": 34.0},
        {"temperature_c": None},
    ):
        assert is_news(told, msgspec.structs.replace(told, **change)), change


def test_this_device_says_what_it_knows():
    state = device_state()
    assert state.free_memory_mb > 0
    assert state.battery_percent is None or 0 <= state.battery_percent <= 100

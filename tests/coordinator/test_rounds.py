"""The state machine of a round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.coordinator.clients.roster import select_random
from edgetrain.coordinator.rounds.state import OUTSTANDING, Outcome, Part, Round


def make(goal=2, minimum=1, clients="abc"):
    state = Round(number=1, nonce=bytes(16), goal=goal, minimum=minimum, deadline_at=100.0)
    for client in clients:
        state.invite(client)
    return state


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("invite"), st.sampled_from("abcde"), st.none()),
            st.tuples(st.sampled_from(["place", "advance"]), st.sampled_from("abcde"), st.sampled_from(list(Part))),
            st.tuples(st.just("forget_all"), st.none(), st.none()),
        )
    )
)
def test_counts_are_those_of_the_clients(steps):
    state = make(clients="")
    for method, client, part in steps:
        getattr(state, method)(*(value for value in (client, part) if value is not None))
        for some in ([], [Part.ACCEPTED], list(OUTSTANDING), list(Part)):
            assert state.count(*some) == sum(part in some for part in state.parts.values())


def test_it_closes_at_its_goal_whatever_the_time():
    state = make()
    state.advance("a", Part.ACCEPTED)
    assert state.outcome(99) is Outcome.OPEN
    state.advance("b", Part.ACCEPTED)
    assert state.outcome(0) is Outcome.CLOSED


@pytest.mark.parametrize("part", sorted(OUTSTANDING, key=str))
def test_it_waits_for_those_on_their_way_until_the_deadline(part):
    state = make(minimum=2)
    state.advance("a", Part.ACCEPTED)
    state.advance("b", part)
    assert state.outcome(99.9) is Outcome.OPEN
    assert state.outcome(100) is Outcome.FAILED


def test_the_minimum_is_enough_at_the_deadline():
    state = make(goal=3, minimum=2)
    for client in "ab":
        state.advance(client, Part.ACCEPTED)
    assert state.outcome(99.9) is Outcome.OPEN
    assert state.outcome(100) is Outcome.CLOSED


@pytest.mark.parametrize("part", [Part.DECLINED, Part.REFUSED, Part.LOST])
def test_it_does_not_wait_for_those_who_will_not_come(part):
    state = make(goal=3, minimum=2)
    state.advance("a", Part.ACCEPTED)
    for client in "bc":
        state.advance(client, part)
    assert state.outcome(0) is Outcome.FAILED
    state.invite("d")
    assert state.outcome(0) is Outcome.OPEN
    state.advance("d", Part.ACCEPTED)
    state.advance("d", part)
    assert state.outcome(0) is Outcome.CLOSED, "two of at least two, and nobody on the way"


def test_nobody_invited_fails():
    assert make(clients="").outcome(0) is Outcome.FAILED


def test_accepted_is_final_and_strangers_are_ignored():
    state = make()
    state.advance("a", Part.ACCEPTED)
    state.advance("a", Part.LOST)
    state.invite("a")
    assert state.parts["a"] is Part.ACCEPTED
    assert not state.waits_for("a")
    state.advance("x", Part.ACCEPTED)
    assert "x" not in state.parts
    assert not state.waits_for("x")


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([*Part, "invite"]), st.floats(0, 200)), max_size=30),
)
def test_whatever_happens_the_count_of_accepted_never_falls_and_closed_means_enough(goal, steps):
    state = make(goal=goal, minimum=max(1, goal - 1))
    accepted = 0
    for client, part, now in steps:
        state.invite(client) if part == "invite" else state.advance(client, part)
        assert state.count(Part.ACCEPTED) >= accepted
        accepted = state.count(Part.ACCEPTED)
        outcome = state.outcome(now)
        if outcome is Outcome.CLOSED:
            assert accepted >= state.minimum
        if accepted >= goal:
            assert outcome is Outcome.CLOSED


def test_selection_depends_on_the_seed_the_round_and_the_attempt_only():
    names = [f"client-{i:02}" for i in range(20)]
    chosen = select_random(names, 5, seed=1, round_number=2, attempt=1)
    assert len(set(chosen)) == 5
    assert chosen == sorted(chosen)
    assert chosen == select_random(names, 5, seed=1, round_number=2, attempt=1)
    others = [
        select_random(names, 5, seed=seed, round_number=number, attempt=attempt)
        for seed, number, attempt in ((2, 2, 1), (1, 3, 1), (1, 2, 2))
    ]
    assert all(other != chosen for other in others)
    assert select_random(names, 50, seed=1, round_number=1, attempt=1) == names
    assert select_random([], 3, seed=1, round_number=1, attempt=1) == []


def test_selection_is_fair():
    names = list("abcdefgh")
    counts = dict.fromkeys(names, 0)
    for number in range(2000):
        for name in select_random(names, 2, seed=0, round_number=number, attempt=1):
            counts[name] += 1
    # 500 each; the standard deviation of a count is below 20.
    assert all(400 < count < 600 for count in counts.values())

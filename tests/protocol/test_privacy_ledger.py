"""What was spent stays spent, whatever happens to the process or the settings."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.protocol.privacy import BudgetExhausted, PrivacyError, Release, spent
from edgetrain.protocol.privacy.ledger import Budget, Ledger

ROUND = Release(mechanism="gaussian", noise_multiplier=2.0)
BUDGET = Budget(epsilon=4.0, delta=1e-6)


def open_ledger(path, budget=BUDGET, owner="federation f"):
    return Ledger(path / "ledger.json", owner=owner, budget=budget)


def charge_until_refused(ledger, release=ROUND):
    count = 0
    while True:
        try:
            ledger.charge(release)
        except BudgetExhausted:
            return count
        count += 1


def test_it_stops_at_the_last_release_that_fits(tmp_path):
    ledger = open_ledger(tmp_path)
    count = charge_until_refused(ledger)
    # By the formula: 4 is passed with this many releases and not with one fewer.
    most = max(n for n in range(100) if n == 0 or spent([ROUND] * n, 1e-6).epsilon <= 4.0)
    assert count == most > 0
    assert ledger.epsilon == pytest.approx(spent([ROUND] * most, 1e-6).epsilon)
    with pytest.raises(BudgetExhausted, match=r"epsilon would be .* of 4 at delta 1e-06 \(spent: "):
        ledger.check(ROUND)
    ledger.close()


def test_another_process_goes_on_where_this_one_stopped(tmp_path):
    first = open_ledger(tmp_path)
    total = charge_until_refused(first)
    first.close()
    other = tmp_path / "other"
    count = 0
    for _ in range(total + 3):
        ledger = open_ledger(other)
        try:
            ledger.charge(ROUND)
            count += 1
        except BudgetExhausted:
            pass
        finally:
            ledger.close()
    assert count == total


def test_less_noise_counts_with_all_that_came_before(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.charge(ROUND)
    ledger.close()
    ledger = open_ledger(tmp_path)
    with pytest.raises(BudgetExhausted):
        ledger.charge(msgspec.structs.replace(ROUND, noise_multiplier=0.5))
    more = msgspec.structs.replace(ROUND, noise_multiplier=8.0)
    ledger.charge(more)
    assert ledger.epsilon == pytest.approx(spent([ROUND, more], 1e-6).epsilon)
    ledger.close()


@pytest.mark.parametrize(("epsilon", "delta"), [(8.0, 1e-6), (4.0, 1e-5), (math.inf, 1e-6)])
def test_a_promise_cannot_be_loosened(tmp_path, epsilon, delta):
    open_ledger(tmp_path).close()
    before = (tmp_path / "ledger.json").read_bytes()
    with pytest.raises(PrivacyError, match="promises epsilon 4 at delta 1e-06.*can be tightened, not loosened"):
        open_ledger(tmp_path, Budget(epsilon=epsilon, delta=delta))
    assert (tmp_path / "ledger.json").read_bytes() == before


def test_a_promise_can_be_tightened_and_then_stays_so(tmp_path):
    open_ledger(tmp_path).close()
    open_ledger(tmp_path, Budget(epsilon=2.0, delta=1e-7)).close()
    with pytest.raises(PrivacyError, match="promises epsilon 2 at delta 1e-07"):
        open_ledger(tmp_path)


def test_only_one_spends_at_a_time(tmp_path):
    ledger = open_ledger(tmp_path)
    with pytest.raises(PrivacyError, match="somebody else is spending"):
        open_ledger(tmp_path)
    ledger.close()
    open_ledger(tmp_path).close()


def test_without_a_limit_it_keeps_count(tmp_path):
    ledger = open_ledger(tmp_path, Budget(epsilon=math.inf, delta=1e-6))
    for _ in range(50):
        ledger.charge(ROUND)
    assert ledger.releases == (msgspec.structs.replace(ROUND, steps=50),)
    ledger.close()


@settings(max_examples=25)
@given(cut=st.integers(0, 400))
def test_a_damaged_ledger_never_counts_as_an_empty_one(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("ledger")
    ledger = open_ledger(path)
    ledger.charge(ROUND)
    ledger.close()
    whole = (path / "ledger.json").read_bytes()
    (path / "ledger.json").write_bytes(whole[: cut % (len(whole) - 1)])
    with pytest.raises(PrivacyError, match="damaged"):
        open_ledger(path)


def test_a_write_that_fails_spends_nothing_and_releases_nothing(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    ledger.charge(ROUND)
    before = (tmp_path / "ledger.json").read_bytes()

    def full(*_arguments, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgetrain.protocol.privacy.ledger.write_atomically", full)
    with pytest.raises(PrivacyError, match="No space left"):
        ledger.charge(ROUND)
    assert (tmp_path / "ledger.json").read_bytes() == before
    assert ledger.releases == (ROUND,)
    ledger.close()


def test_somebody_elses_ledger_and_other_versions_are_refused(tmp_path):
    open_ledger(tmp_path).close()
    with pytest.raises(PrivacyError, match="of 'federation f', not of 'client c'"):
        open_ledger(tmp_path, owner="client c")
    path = tmp_path / "ledger.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(PrivacyError):
        open_ledger(tmp_path)
    with pytest.raises(PrivacyError, match="cannot use"):
        Ledger(path / "below", owner="x", budget=BUDGET)

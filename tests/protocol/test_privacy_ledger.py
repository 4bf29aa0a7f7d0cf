"""What was spent stays spent, whatever happens to the process or the settings."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.protocol.privacy import BudgetExhausted, PrivacyError, Release, spent
from edgetrain.protocol.privacy.ledger import Budget, Ledger
from edgetrain.protocol.privacy.ledger_file import decode_ledger, read_ledger, releases_with

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


def test_every_byte_counts(tmp_path):
    """Whatever one byte becomes, the ledger is refused, or says the same (white space, a name that nobody reads)."""
    ledger = open_ledger(tmp_path)
    ledger.charge(ROUND, ["a", "b"])
    ledger.close()
    path = tmp_path / "ledger.json"
    whole = path.read_bytes()
    said = read_ledger(path)
    refused = 0
    for place in range(len(whole)):
        for bit in (0, 4):
            damaged = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
            try:
                assert decode_ledger(damaged, where="x") == said, place
            except PrivacyError as error:
                assert "damaged" in str(error)
                refused += 1
    assert refused > 1.9 * len(whole.translate(None, b" \n"))


def test_a_ledger_from_before_checksums_gets_one(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.charge(ROUND)
    ledger.close()
    path = tmp_path / "ledger.json"
    old = json.loads(path.read_bytes())
    del old["checksum"], old["participants"]
    path.write_text(json.dumps(old | {"format_version": 1}))
    ledger = open_ledger(tmp_path)
    assert ledger.epsilon == spent([ROUND], 1e-6).epsilon
    ledger.close()
    assert json.loads(path.read_bytes())["format_version"] == 2
    assert read_ledger(path).checksum
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format_version": 3}))
    with pytest.raises(PrivacyError, match="damaged"):
        open_ledger(tmp_path)


def test_what_each_participant_was_in(tmp_path):
    """A sampled release costs whoever is known to be in it what the release costs without sampling."""
    sampled = msgspec.structs.replace(ROUND, sampling="poisson", sampling_rate=0.01)
    ledger = open_ledger(tmp_path)
    for release, names in ((sampled, "ab"), (sampled, "b"), (ROUND, "c"), (sampled, "ac")):
        ledger.charge(release, names)
    ledger.close()
    file = read_ledger(tmp_path / "ledger.json")
    assert file.participants == {"a": (2,), "b": (2,), "c": (1, 1)}
    assert releases_with(file, "a") == (msgspec.structs.replace(ROUND, steps=2),)
    assert spent(releases_with(file, "c"), 1e-6) == spent([ROUND, ROUND], 1e-6)
    assert releases_with(file, "nobody") == ()
    # Sampling makes the federation's own epsilon smaller than that of three known rounds.
    assert spent(file.releases, 1e-6).epsilon < spent([ROUND] * 2, 1e-6).epsilon


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
    path.write_bytes(path.read_bytes().replace(b'"format_version": 2', b'"format_version": 3'))
    with pytest.raises(PrivacyError):
        open_ledger(tmp_path)
    with pytest.raises(PrivacyError, match="cannot use"):
        Ledger(path / "below", owner="x", budget=BUDGET)

"""`edgetrain privacy plan` and `show`."""

from __future__ import annotations

import json
import math

import dp_accounting
import pytest
from click.testing import CliRunner
from dp_accounting.rdp import RdpAccountant

from edgetrain.cli.privacy import command
from edgetrain.protocol.privacy import PrivacyError, Release, spent
from edgetrain.protocol.privacy.ledger import Budget, Ledger

CLIENTS = ["plan", "--epsilon", "4", "--delta", "1e-6", "--rounds", "200", "--clients-per-round", "100",
           "--population", "10000"]  # fmt: skip
SAMPLES = ["plan", "--level", "sample", "--epsilon", "2", "--delta", "1e-5", "--rounds", "10", "--examples", "1000",
           "--batch-size", "32", "--epochs", "2"]  # fmt: skip


def plan(*arguments):
    result = CliRunner().invoke(command, [*arguments, "--format", "json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_client_level():
    found = plan(*CLIENTS)
    theirs = RdpAccountant().compose(
        dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(found["noise_multiplier"])), 200
    )
    assert theirs.get_epsilon(1e-6) == pytest.approx(4.0, rel=0.01)
    assert 3.999 < found["epsilon"] <= 4.0
    assert found["noise_per_clip_norm"] == found["noise_multiplier"]
    assert found["mean_noise_per_clip_norm"] == pytest.approx(found["noise_multiplier"] / 100)
    assert found["course"][-1] == [200, found["epsilon"]]
    assert found["course"] == sorted(found["course"])


def test_replacing_a_client_takes_twice_the_clip_norm():
    found = plan(*CLIENTS, "--sampling", "fixed")
    assert found["noise_per_clip_norm"] == 2 * found["noise_multiplier"]


def test_without_chance_it_takes_more_noise():
    assert plan(*CLIENTS, "--sampling", "none")["noise_multiplier"] > 10 * plan(*CLIENTS)["noise_multiplier"]


def test_noise_that_clients_add_takes_a_little_more_where_chance_helps():
    """The theorem for any mechanism on a Poisson sample is weaker than that for the Gaussian; without chance they are
    alike."""
    found = plan(*CLIENTS, "--noise", "discrete-gaussian")
    release = Release(noise_multiplier=found["noise_multiplier"], sampling="poisson", sampling_rate=0.01, steps=200)
    assert spent([release], 1e-6).epsilon == pytest.approx(4.0, rel=1e-3)
    assert 1 < found["noise_multiplier"] / plan(*CLIENTS)["noise_multiplier"] < 1.1
    without = [plan(*CLIENTS, "--sampling", "none", "--noise", noise) for noise in ("gaussian", "discrete-gaussian")]
    assert without[0]["noise_multiplier"] == without[1]["noise_multiplier"]


def test_sample_level():
    found = plan(*SAMPLES)
    # ceil(1000 / 32) = 32 steps an epoch.
    assert found["releases"] == 10 * 2 * 32
    assert found["sampling_rate"] == 0.032
    theirs = RdpAccountant().compose(
        dp_accounting.PoissonSampledDpEvent(0.032, dp_accounting.GaussianDpEvent(found["noise_multiplier"])), 640
    )
    assert theirs.get_epsilon(1e-5) == pytest.approx(2.0, rel=0.01)


def test_for_people_it_is_a_table():
    result = CliRunner().invoke(command, CLIENTS)
    assert "noise_multiplier 0.71552" in result.output
    assert "  200    4.0000" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (CLIENTS[:-2], "--population is needed"),
        ([*CLIENTS, "--population", "10"], "more than --population 10"),
        ([*CLIENTS, "--level", "sample"], "--batch-size is needed"),
        ([*SAMPLES, "--noise", "discrete-gaussian"], "a device adds the noise alone"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert message in result.output


# --- show --------------------------------------------------------------------------------------------

ROUND = Release(mechanism="gaussian", noise_multiplier=2.0, sampling="poisson", sampling_rate=0.1)


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "privacy-f.json"
    made = Ledger(path, owner="federation f", budget=Budget(epsilon=8.0, delta=1e-6))
    made.charge(ROUND, ["a", "b"])
    made.charge(ROUND, ["b"])
    made.close()
    return path


def show(*arguments):
    result = CliRunner().invoke(command, ["show", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_what_was_spent_and_by_whom(ledger):
    found = json.loads(show(ledger, "--format", "json"))
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    sampled = RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.1, gaussian), 2)
    assert found["epsilon"] == pytest.approx(sampled.get_epsilon(1e-6), rel=0.01)
    assert (found["budget"], found["releases"][0]["sums"]) == (8.0, 2)
    for row, name, sums in zip(found["clients"], "ab", (1, 2), strict=True):
        known = RdpAccountant().compose(gaussian, sums).get_epsilon(1e-6)
        assert (row["client"], row["sums"]) == (name, sums)
        assert row["epsilon"] == pytest.approx(known, rel=0.01)
    text = show(ledger)
    assert "2 sums with gaussian noise, multiplier 2, poisson sampling, rate 0.1" in text
    assert f"{'b':<32} {2:>6}" in text
    assert "a  " not in show(ledger, "--client", "b")
    assert "nothing about c" in show(ledger, "--client", "c")


def test_of_a_device_and_what_is_damaged(tmp_path, ledger):
    Ledger(tmp_path / "privacy.json", owner="client a", budget=Budget(epsilon=math.inf, delta=1e-5)).close()
    assert show(tmp_path) == "client a: epsilon 0 no limit at delta 1e-05\n"
    ledger.write_bytes(ledger.read_bytes().replace(b'"steps": 2', b'"steps": 1'))
    result = CliRunner().invoke(command, ["show", str(ledger)])
    assert isinstance(result.exception, PrivacyError)
    assert "is damaged (its checksum is another)" in str(result.exception)
    result = CliRunner().invoke(command, ["show", str(tmp_path / "none")])
    assert "there is no privacy ledger" in str(result.exception)

"""The example of the five hospitals, as it stands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgetrain.protocol.privacy import Release, spent

EXAMPLE = Path(__file__).parents[2] / "examples" / "healthcare" / "run.py"


@pytest.mark.timeout(290)
def test_five_hospitals_learn_within_their_budget(tmp_path):
    out = tmp_path / "hospitals"
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--out", out], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = [json.loads(line) for line in (out / "run/rounds.jsonl").read_text().splitlines()]
    ledger = json.loads((out / "privacy-hospitals.json").read_text())
    assert len(rounds) == ledger["releases"][0]["steps"] == 10
    assert (ledger["releases"][0]["mechanism"], ledger["releases"][0]["shares"]) == ("discrete-gaussian", 5)
    assert "secure aggregation of 5 clients" in done.stderr
    noise = ledger["releases"][0]["noise_multiplier"]
    for number, record in enumerate(rounds, 1):
        # Five shares of noise are as good as one: the difference is far below what is compared.
        by_hand = spent([Release(mechanism="gaussian", noise_multiplier=noise, steps=number)], 1e-3).epsilon
        assert record["epsilon"] == pytest.approx(by_hand)
        assert f"{record['epsilon']:.3f} of 10" in done.stdout
    assert rounds[-1]["epsilon"] <= 10
    # Always guessing benign is right for 63 %; without noise it is 98 %.
    assert sum(record["accuracy"] for record in rounds[-3:]) / 3 > 0.85
    assert "round 11 was refused before it started" in done.stdout
    command = [sys.executable, "-m", "edgetrain", "privacy", "show", out / "run", "--format", "json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert shown["epsilon"] == pytest.approx(rounds[-1]["epsilon"])
    # Nobody was drawn: each hospital's part has cost what all have spent.
    assert [(row["sums"], row["epsilon"]) for row in shown["clients"]] == [(10, shown["epsilon"])] * 5
    assert "run: whole: " in done.stdout
    assert "10 privacy" in done.stdout

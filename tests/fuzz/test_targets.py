"""The fuzzer's targets on hypothesis' inputs: a short version of scripts/fuzz for every run of the suite."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

spec = importlib.util.spec_from_file_location("fuzz_targets", Path(__file__).parent / "targets.py")
assert spec
assert spec.loader
targets = importlib.util.module_from_spec(spec)
sys.modules["fuzz_targets"] = targets  # dataclasses look there
spec.loader.exec_module(targets)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_target_survives_any_bytes_and_any_edits(name):
    target = targets.TARGETS[name]
    seeds = target.seeds()
    assert any(target.one(seed) for seed in seeds), "the seeds decode"

    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=500))
    def whatever(data):
        target.one(data)
        target.one(targets.edited(seeds, data))

    whatever()

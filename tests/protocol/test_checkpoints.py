"""Checkpoints of the audit log as clients remember them: a rewritten history is noticed, an honest one never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.checkpoints import CheckpointMemory, contradiction, read_seen
from edgetrain.protocol.messages import Checkpoint, LogPoint

RUN = bytes(range(16))


def point(records, history=0):
    return LogPoint(records=records, head=bytes([history]) * 24 + records.to_bytes(8, "little"))


def message(*counts, serial, history=0, run=RUN):
    *earlier, newest = [point(count, history) for count in counts]
    return Checkpoint(run=run, newest=newest, earlier=tuple(earlier), serial=serial)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80, unique=True), st.data())
def test_an_honest_history_is_never_contradicted(counts, data):
    """Whatever messages a client misses, sees twice or out of order."""
    counts = sorted(counts)
    told = [message(*counts[max(0, end - 64) : end], serial=end) for end in range(1, len(counts) + 1)]
    seen = data.draw(st.lists(st.sampled_from(told), max_size=20))
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        memory = CheckpointMemory(Path(directory))
        assert [memory.take(one) for one in seen] == [None] * len(seen)
        assert {entry.records for entry in read_seen(Path(directory) / "checkpoints.jsonl")} == {
            one.newest.records for one in seen
        }


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        (message(10, 20, 30, serial=4, history=1), "line 10 of the audit log is another one"),
        (message(12, 22, 30, serial=4, history=1), "line 20 of the audit log is not in its history any more"),
        (message(5, 12, 40, serial=4, history=1), "line 10 of the audit log is not in its history any more"),
        (message(10, 15, serial=4), "had 20 lines and now has 15"),
        (message(10, 20, 20, serial=4), "names one length of its audit log twice"),
    ],
)
def test_a_rewritten_history_is_noticed(tmp_path, later, reason):
    memory = CheckpointMemory(tmp_path)
    assert memory.take(message(10, serial=1)) is None
    assert memory.take(message(10, 20, serial=2)) is None
    # Also by the process after this one.
    assert reason in CheckpointMemory(tmp_path).take(later)
    # And what it said is not remembered in place of the old.
    assert [entry.records for entry in read_seen(tmp_path / "checkpoints.jsonl")] == [10, 20]


def test_another_run_is_another_history(tmp_path):
    memory = CheckpointMemory(tmp_path)
    memory.take(message(10, 20, serial=2))
    assert memory.take(message(5, serial=3, history=1, run=bytes(16))) is None


def test_an_old_message_that_comes_late_is_no_rewriting(tmp_path):
    memory = CheckpointMemory(tmp_path)
    memory.take(message(10, 20, serial=2))
    assert memory.take(message(10, serial=1)) is None


def test_a_damaged_memory_is_no_end(tmp_path):
    (tmp_path / "checkpoints.jsonl").write_bytes(b'{"run": 5}\n\xff\n[[[\n')
    memory = CheckpointMemory(tmp_path)
    assert memory.take(message(10, serial=1)) is None
    assert contradiction([], message(10, serial=1)) is None

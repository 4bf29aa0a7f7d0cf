"""What compression leaves out is sent later; nothing is lost and nothing is counted twice."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetrain.edge_client.durable.error_feedback import ErrorFeedback
from edgetrain.edge_client.errors import StateError
from edgetrain.protocol import CodecError, Limits, decode
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.messages import Offer

SIZE = 40
RUN, BUNDLE = b"r" * 16, b"b" * 32
CODECS = ["topk:0.1|int8:block=16", "topk:3", "sign:block=8", "int4:block=8:stochastic", "dense|float32"]


def open_feedback(path, *, run=RUN, bundle=BUNDLE, size=SIZE):
    return ErrorFeedback(path / "residual.bin", bundle=bundle, run=run, num_parameters=size)


def offer_for(update, number=1):
    return Offer(run=RUN, round=number, nonce=bytes(16), update=blob_ref(update), num_examples=1, steps=1)


def commit(feedback, delta, codec="topk:0.1|int8:block=16", number=1):
    update = feedback.prepare(delta, codec, seed=number)
    feedback.commit(offer_for(update, number))
    return update


def decoded(update, size=SIZE):
    return decode(update, Limits(max_parameters=size)).dense()


def random_delta(seed, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(SIZE) * scale).astype(np.float32)


def test_by_hand(tmp_path):
    """Top 1 of (3, 2, 0): sends 3, keeps 2; with (0, 0.5, 1) that is (0, 2.5, 1): sends 2.5, keeps 1."""
    feedback = open_feedback(tmp_path, size=3)
    for delta, sent, left in (([3, 2, 0], [3, 0, 0], [0, 2, 0]), ([0, 0.5, 1], [0, 2.5, 0], [0, 0, 1])):
        update = commit(feedback, np.array(delta, np.float32), "topk:1")
        assert decoded(update, 3).tolist() == sent
        feedback.settle(accepted=True)
        assert feedback.residual.tolist() == left


def test_a_refused_update_returns_whole(tmp_path):
    feedback = open_feedback(tmp_path)
    delta = random_delta(0)
    commit(feedback, delta)
    feedback.settle(accepted=False)
    np.testing.assert_array_equal(feedback.residual, delta)
    assert feedback.offer is None


# What may happen to an update, in the words of both ends.
OUTCOMES = [
    "accepted",
    "refused",
    "accepted, verdict lost in a crash",  # the coordinator has it; the client asks again after its restart
    "crash before it was sent, then accepted",
    "crash before it was sent, then refused",
    "crash after training",  # nothing was committed: that training did not happen
    "accepted, crash after settling",
    "disk full at commit",
    "diverged",
]


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(OUTCOMES), st.sampled_from(CODECS), st.sampled_from([1e-3, 1.0, 1e3])), max_size=8
    )
)
def test_accepted_plus_residual_is_the_sum_of_the_deltas(ram_path, history):
    path = Path(tempfile.mkdtemp(dir=ram_path))
    feedback = open_feedback(path)
    accepted, trained, size = np.zeros(SIZE), np.zeros(SIZE), 1.0
    for number, (outcome, codec, scale) in enumerate(history, 1):
        delta = random_delta(number, scale)
        size = max(size, float(np.abs(delta).max()))
        if outcome == "diverged":
            with pytest.raises(CodecError):
                feedback.prepare(delta * np.float32(np.inf), codec, seed=number, offsets=(0,))
            feedback = open_feedback(path)
            continue
        update = feedback.prepare(delta, codec, seed=number, offsets=(0,))
        if outcome == "crash after training":
            feedback = open_feedback(path)
            continue
        if outcome == "disk full at commit":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "replace", no_space)
                with pytest.raises(StateError):
                    feedback.commit(offer_for(update, number))
            feedback = open_feedback(path)
            continue
        feedback.commit(offer_for(update, number))
        if "crash" in outcome and "after settling" not in outcome:
            feedback = open_feedback(path)
            assert feedback.offer == offer_for(update, number), "the same offer, with the same digest"
            assert feedback.update == update
        trained += delta
        taken = "accepted" in outcome
        if taken:
            accepted += decoded(update)
        feedback.settle(accepted=taken)
        if outcome.endswith("after settling"):
            feedback = open_feedback(path)
        np.testing.assert_allclose(accepted + feedback.residual, trained, atol=size * 2e-5)
        assert feedback.offer is None


def no_space(*_args):
    raise OSError(28, "No space left on device")


def test_a_crash_at_any_write_leaves_a_state_that_adds_up(tmp_path, monkeypatch):
    """The file is replaced whole: after a failed settle it is as before, pending, and asks again."""
    feedback = open_feedback(tmp_path)
    delta = random_delta(1)
    update = commit(feedback, delta)
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(StateError, match="cannot store the residual.*No space left"):
        feedback.settle(accepted=True)
    monkeypatch.undo()
    again = open_feedback(tmp_path)
    assert again.update == update
    again.settle(accepted=True)
    np.testing.assert_allclose(decoded(update) + again.residual, delta, atol=1e-6)


def test_only_one_update_at_a_time(tmp_path):
    feedback = open_feedback(tmp_path)
    commit(feedback, random_delta(1))
    with pytest.raises(AssertionError):
        feedback.prepare(random_delta(2), "topk:1", seed=0)


def test_the_offer_must_be_of_the_update(tmp_path):
    feedback = open_feedback(tmp_path)
    feedback.prepare(random_delta(1), "topk:1", seed=0)
    with pytest.raises(AssertionError):
        feedback.commit(offer_for(b"another"))


@pytest.mark.parametrize("other", [{"run": b"x" * 16}, {"bundle": b"x" * 32}, {"size": SIZE + 1}], ids=str)
def test_a_residual_of_another_run_or_bundle_is_dropped(tmp_path, other):
    commit(open_feedback(tmp_path), random_delta(1))
    feedback = open_feedback(tmp_path, **other)
    assert not feedback.residual.any()
    assert feedback.offer is None


def test_a_damaged_file_is_noticed_and_left_behind(tmp_path, caplog):
    commit(open_feedback(tmp_path), random_delta(1))
    path = tmp_path / "residual.bin"
    data = path.read_bytes()
    for position in [*range(0, len(data), 7), len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        feedback = open_feedback(tmp_path)
        if position == 3:
            continue  # the reserved byte
        assert feedback.offer is None, position
        assert not feedback.residual.any(), position
    assert "is damaged" in caplog.text


def test_a_torn_file_is_noticed(tmp_path):
    commit(open_feedback(tmp_path), random_delta(1))
    path = tmp_path / "residual.bin"
    data = path.read_bytes()
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        feedback = open_feedback(tmp_path)
        assert feedback.offer is None
        assert not feedback.residual.any()


def test_an_unreadable_file_is_an_error(tmp_path):
    (tmp_path / "residual.bin").mkdir()
    with pytest.raises(StateError, match="cannot read the residual"):
        open_feedback(tmp_path)

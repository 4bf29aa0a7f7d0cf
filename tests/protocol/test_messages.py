"""Messages: what goes in comes out; whatever else comes in is a `MessageError`."""

from __future__ import annotations

import math
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.protocol.errors import MessageError
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Checkpoint,
    Decline,
    DeviceInfo,
    FromClient,
    FromCoordinator,
    Goodbye,
    Hello,
    LogPoint,
    Offer,
    Patch,
    Plan,
    Ready,
    Refusal,
    Report,
    Resources,
    RoundClosed,
    Secure,
    Verdict,
    Want,
    Welcome,
    decode_from_client,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.training import ScheduleConfig, TrainingConfig

counts = st.integers(0, 2**53)
nonces = st.binary(min_size=16, max_size=16)
digests = st.binary(min_size=32, max_size=32)
texts = st.text(max_size=100)
numbers = st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False), max_size=4)
refs = st.builds(BlobRef, digest=digests, size=counts)
ranges = st.lists(st.tuples(counts, counts), max_size=5).map(tuple)
wants = st.builds(Want, digest=digests, ranges=ranges)
resources = st.builds(
    Resources, seconds=st.floats(0, 1e9), peak_memory_mb=st.floats(0, 1e9), bytes_sent=counts, bytes_received=counts
)
trainings = st.builds(
    TrainingConfig,
    epochs=st.integers(1, 100),
    learning_rate=st.floats(0, 10),
    schedule=st.builds(ScheduleConfig, name=st.sampled_from(["constant", "cosine"]), warmup_steps=st.integers(0, 9)),
)
secures = st.builds(Secure, run=nonces, round=counts, nonce=nonces, body=st.binary(max_size=50))
from_client = st.one_of(
    st.builds(
        Hello, public_key=digests, connection=nonces, edgetrain=texts, runtimes=st.lists(texts, max_size=4).map(tuple),
        device=st.builds(DeviceInfo, system=texts, machine=texts, cpus=counts, memory_mb=counts),
    ),
    st.builds(Ready, connection=st.none() | nonces, bundle=digests, runtime=texts, num_examples=counts),
    st.builds(Decline, round=counts, nonce=nonces, reason=texts),
    st.builds(
        Offer, run=nonces, round=counts, nonce=nonces, update=refs, num_examples=counts, steps=counts,
        metrics=numbers, resources=resources,
    ),
    st.builds(
        Report, run=nonces, round=counts, nonce=nonces, num_examples=counts, metrics=numbers, resources=resources,
    ),
    st.builds(Goodbye, reason=texts, connection=nonces),
    secures,
    wants,
)  # fmt: skip
points = st.builds(LogPoint, records=counts, head=digests)
from_coordinator = st.one_of(
    st.builds(
        Announce, run=nonces, public_key=digests, edgetrain=texts, bundle=refs,
        status=st.sampled_from(["open", "paused", "ended"]), reason=texts, serial=counts,
    ),
    st.builds(Welcome, run=nonces),
    st.builds(Refusal, reason=texts, connection=nonces),
    st.builds(
        Plan, run=nonces, round=counts, nonce=nonces, task=st.sampled_from(["train", "evaluate"]), bundle=digests,
        vector=digests, patches=st.lists(st.builds(Patch, base=digests, blob=refs), max_size=3).map(tuple),
        parameters=refs, training=trainings, codec=texts,
        secure=st.binary(max_size=9), deadline_seconds=st.floats(0, 1e9), seed=counts,
    ),
    st.builds(Verdict, round=counts, digest=digests, accepted=st.booleans(), reason=texts),
    st.builds(RoundClosed, run=nonces, round=counts, nonce=nonces),
    st.builds(
        Checkpoint, run=nonces, newest=points, earlier=st.lists(points, max_size=3).map(tuple), serial=counts,
    ),
    secures,
    wants,
)  # fmt: skip

OFFER = Offer(
    run=bytes(16), round=1, nonce=bytes(16), update=BlobRef(digest=bytes(32), size=9), num_examples=3, steps=2
)


@given(from_client)
def test_what_a_client_says_arrives(message):
    assert decode_from_client(encode_message(message)) == message


@given(from_coordinator)
def test_what_the_coordinator_says_arrives(message):
    assert decode_from_coordinator(encode_message(message)) == message


def test_the_strategies_cover_every_message():
    """A new message needs a strategy above."""
    tried = {
        Hello,
        Ready,
        Decline,
        Offer,
        Report,
        Goodbye,
        Want,
        Announce,
        Welcome,
        Refusal,
        Plan,
        Verdict,
        RoundClosed,
        Checkpoint,
        Secure,
    }
    assert set(get_args(FromClient)) | set(get_args(FromCoordinator)) == tried


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_message_errors_only(data):
    for decode in (decode_from_client, decode_from_coordinator):
        with pytest.raises(MessageError):
            decode(data)


@settings(max_examples=300)
@given(st.one_of(from_client, from_coordinator), st.data())
def test_damaged_messages_decode_or_raise_message_errors(message, data):
    body = bytearray(encode_message(message))
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    body = body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body
    for decode in (decode_from_client, decode_from_coordinator):
        try:
            decode(bytes(body))
        except MessageError:
            continue


def spoiled(**changes):
    return msgspec.msgpack.encode(msgspec.to_builtins(OFFER, builtin_types=(bytes,)) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "unheard-of"},
        {"type": 5},
        {"round": -1},
        {"round": 2**53 + 1},
        {"round": "1"},
        {"round": 1.5},
        {"run": bytes(15)},
        {"nonce": bytes(17)},
        {"update": {"digest": bytes(31), "size": 1}},
        {"update": {"digest": bytes(32), "size": -1}},
        {"num_examples": True},
        {"num_examples": None},
        {"metrics": {"x" * 101: 1.0}},
        {"metrics": {str(i): 1.0 for i in range(65)}},
        {"metrics": {"loss": "low"}},
        {"resources": []},
    ],
    ids=str,
)
def test_fields_out_of_their_bounds_are_refused(changes):
    assert decode_from_client(spoiled()) == OFFER
    with pytest.raises(MessageError, match="breaks the schema"):
        decode_from_client(spoiled(**changes))


def test_a_missing_field_is_refused():
    plain = msgspec.to_builtins(OFFER, builtin_types=(bytes,))
    del plain["nonce"]
    with pytest.raises(MessageError, match="nonce"):
        decode_from_client(msgspec.msgpack.encode(plain))


def test_unknown_fields_are_ignored():
    assert decode_from_client(spoiled(colour="blue")) == OFFER


def test_each_side_understands_only_what_the_other_may_say():
    with pytest.raises(MessageError):
        decode_from_client(encode_message(Welcome(run=bytes(16))))
    with pytest.raises(MessageError):
        decode_from_coordinator(encode_message(OFFER))


def test_deep_nesting_is_a_message_error():
    with pytest.raises(MessageError):
        decode_from_client(b"\x82\xa4type\xa5offer\xa1x" + b"\x91" * 60_000 + b"\xc0")


def test_a_plan_that_no_trainer_can_follow_is_refused():
    plan = Plan(
        run=bytes(16), round=1, nonce=bytes(16), bundle=bytes(32), vector=bytes(32), parameters=OFFER.update,
        deadline_seconds=1,
    )  # fmt: skip
    plain = msgspec.to_builtins(plan, builtin_types=(bytes,))
    for changes in ({"epochs": 0}, {"batch_size": -1}, {"learning_rate": -0.1}, {"momentum": 1.0}):
        with pytest.raises(MessageError, match="breaks the schema"):
            decode_from_coordinator(msgspec.msgpack.encode(plain | {"training": changes}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metrics_may_be_anything_in_transit(value):
    """Whether they count is for the receiver to say: they cannot be kept out of msgpack."""
    message = msgspec.structs.replace(OFFER, metrics={"loss": value})
    assert str(decode_from_client(encode_message(message)).metrics["loss"]) == str(value)

"""Windows, caps and delays by hand, and the outgoing queue against a plain model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol.blobs import HEADER_BYTES, Blob, parse_chunk
from edgetrain.protocol.transport.outgoing import Control, Outgoing, Piece
from edgetrain.protocol.transport.pacing import Backoff, RateMeter, TokenBucket


def test_chunks_and_windows_suit_the_link():
    meter = RateMeter()
    assert (meter.rate, meter.chunk_bytes(), meter.window_bytes()) == (None, 4096, 8192)
    meter.add(1000, 0.125)  # 64 kbit/s
    assert meter.rate == pytest.approx(8000)
    assert meter.chunk_bytes() == 1600  # 0.2 s
    assert meter.window_bytes() == 8000  # 1 s
    meter.add(1000, 0.001)
    assert meter.rate == pytest.approx(2 / (1 / 8000 + 1 / 1e6))  # 15,873: not much more than double
    for _ in range(20):
        meter.add(1000, 0.0)
    assert meter.chunk_bytes() == 60 << 10
    assert meter.chunk_bytes(5000) == 5000
    assert meter.window_bytes() == 4 << 20
    meter.add(1000, 10.0)
    assert meter.chunk_bytes() == 1 << 10
    assert meter.window_bytes() == 2 << 10


def test_a_cap_holds_in_the_long_run():
    bucket, now, sent = TokenBucket(1000.0), 0.0, 0
    while now < 60:
        wait = bucket.wait(now)
        if wait > 0:
            now += wait
            continue
        bucket.take(700)
        sent += 700
    assert 60_000 <= sent <= 60_000 + 1024 + 700
    assert bucket.within(60_000) == 1024
    assert bucket.within(60_000, 2.0) == 2000
    free = TokenBucket(0)
    assert (free.wait(0.0), free.within(60_000)) == (0, 60_000)


def test_delays_double_and_are_spread():
    backoff = Backoff(random.Random(1), first=1.0, most=60.0)
    for ceiling in (1, 2, 4, 8, 16, 32, 60, 60):
        assert 0 < backoff.next() <= ceiling
    backoff.reset()
    delays = [Backoff(random.Random(seed)).next() for seed in range(1000)]
    # Uniform in (0, 1]: the busiest tenth of a second sees about 100 of 1,000.
    tenths = [sum(number / 10 < delay <= (number + 1) / 10 for delay in delays) for number in range(10)]
    assert sum(tenths) == 1000
    assert max(tenths) < 140


def drained(outgoing, now=0.0, packet=0):
    """Takes out all that may go; (packet id, what) each."""
    taken = []
    while (what := outgoing.next(now)) is not None:
        packet += 1
        outgoing.sent(packet, what, now)
        taken.append((packet, what))
    return taken


def fast():
    outgoing = Outgoing()
    outgoing.max_messages = 1000
    for _ in range(40):
        outgoing.meter.add(1 << 20, 0.0)
    return outgoing


def test_messages_go_before_blobs_and_blobs_in_turn():
    outgoing = fast()
    for topic in ("a", "b"):
        outgoing.put_blob(topic, Blob(topic.encode() * 5000), (), 2000)
    outgoing.put(Control("m", b"1"))
    outgoing.put(Control("m", b"2"))
    assert [what.topic for _, what in drained(outgoing)] == ["m", "m", "a", "b", "a", "b", "a", "b"]


def test_no_more_is_on_the_way_than_the_broker_takes_and_the_link_carries():
    outgoing = Outgoing()
    outgoing.max_messages = 3
    outgoing.put_blob("t", Blob(bytes(100_000)), (), 0)
    first = drained(outgoing)
    assert len(first) == 2, "two chunks of 4 KiB fill the first window"
    outgoing.put(Control("m", b"x"))
    outgoing.put(Control("m", b"y"))
    assert [what.payload for _, what in drained(outgoing, packet=10)] == [b"x"], "three messages are on the way"
    outgoing.acknowledged(1, 1.0)
    assert [what.payload for _, what in drained(outgoing, packet=20)] == [b"y"]


def test_chunks_are_no_larger_than_the_broker_takes():
    outgoing = fast()
    outgoing.max_payload = 1500
    outgoing.put_blob("t", Blob(bytes(5000)), (), 0)
    assert {len(what.payload) for _, what in drained(outgoing)} == {1500, 5000 % 1440 + HEADER_BYTES}


def test_a_lost_connection_sends_again_what_was_not_acknowledged_and_nothing_else():
    outgoing = fast()
    outgoing.put(Control("m", b"kept"))
    outgoing.put(Control("m", b"asked anew", transient=True))
    outgoing.put_blob("t", Blob(bytes(10_000)), (), 1000)
    taken = drained(outgoing)
    acknowledged = [packet for packet, what in taken if isinstance(what, Piece)][:4]
    for packet in acknowledged:
        outgoing.acknowledged(packet, 0.0)
    outgoing.connection_lost()
    again = [what for _, what in drained(outgoing)]
    assert again[0].payload == b"kept"
    assert [(what.start, what.stop) for what in again[1:]] == [(n, n + 1000) for n in range(4000, 10_000, 1000)]


def test_a_blob_whose_receiver_asks_is_dropped_with_the_connection():
    outgoing = fast()
    blob = Blob(bytes(10_000))
    outgoing.put_blob("t", blob, (), 1000, resend=False)
    for packet in range(4):
        outgoing.sent(packet, outgoing.next(0.0), 0.0)
    outgoing.connection_lost()
    assert outgoing.empty
    outgoing.put_blob("t", blob, [(2000, 10_000)], 1000, resend=False)
    assert [what.start for _, what in drained(outgoing)] == list(range(2000, 10_000, 1000))


def test_a_forgotten_blob_stays_forgotten_after_a_reconnect():
    outgoing = fast()
    blob = Blob(bytes(5000))
    outgoing.put_blob("t", blob, (), 1000)
    outgoing.sent(1, outgoing.next(0.0), 0.0)
    outgoing.forget_blob(blob.ref.digest)
    outgoing.connection_lost()
    assert drained(outgoing) == []
    assert outgoing.empty


@given(st.data())
def test_every_byte_asked_for_arrives_and_none_is_on_the_way_twice(data):
    """Requests, acknowledgements and cuts in any order, against sets of positions."""
    blob = Blob(bytes(range(200)))
    outgoing = fast()
    wanted, delivered, on_the_way = set(), set(), {}
    packet = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["want", "send", "acknowledge", "cut"]))
        if action == "want":
            start, stop = sorted(data.draw(st.tuples(st.integers(0, 200), st.integers(0, 200))))
            outgoing.put_blob("t", blob, [(start, stop)], data.draw(st.integers(1, 50)))
            wanted |= set(range(start, stop))
        elif action == "send" and (what := outgoing.next(0.0)) is not None:
            packet += 1
            chunk = parse_chunk(what.payload)
            positions = set(range(chunk.offset, chunk.offset + len(chunk.data)))
            assert bytes(chunk.data) == bytes(sorted(positions))
            assert not any(positions & others for others in on_the_way.values())
            outgoing.sent(packet, what, 0.0)
            on_the_way[packet] = positions
        elif action == "acknowledge" and on_the_way:
            number = data.draw(st.sampled_from(sorted(on_the_way)))
            delivered |= on_the_way.pop(number)
            outgoing.acknowledged(number, 0.0)
        elif action == "cut":
            outgoing.connection_lost()
            on_the_way.clear()
    while (what := outgoing.next(0.0)) is not None:
        packet += 1
        outgoing.sent(packet, what, 0.0)
        on_the_way[packet] = set(range(what.start, what.stop))
    assert delivered.union(*on_the_way.values()) == wanted
    for number in on_the_way:
        outgoing.acknowledged(number, 0.0)
    assert outgoing.empty

"""Chunks: any order, any cut, any number of times; hostile ones change nothing."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetrain.protocol.blobs import HEADER_BYTES, Assembler, blob_ref, cut, parse_chunk
from edgetrain.protocol.errors import BlobError
from edgetrain.protocol.messages import BlobRef


def chunk(data, *, digest, offset, size, check=None, magic=b"EC", version=1):
    """Written from the format's description, not by `cut`."""
    check = hashlib.sha256(data).digest()[:8] if check is None else check
    return magic + bytes([version, 0]) + digest + struct.pack("<QQ", offset, size) + check + data


def assemble(ref, payloads, limit=1 << 20):
    assembler = Assembler(ref, limit=limit)
    for payload in payloads:
        assembler.add(parse_chunk(payload))
    return assembler


def test_a_chunk_by_hand():
    data = b"0123456789"
    ref = blob_ref(data)
    assert ref == BlobRef(digest=hashlib.sha256(data).digest(), size=10)
    assert list(cut(ref, data, chunk_bytes=4)) == [
        chunk(b"0123", digest=ref.digest, offset=0, size=10),
        chunk(b"4567", digest=ref.digest, offset=4, size=10),
        chunk(b"89", digest=ref.digest, offset=8, size=10),
    ]
    assert HEADER_BYTES == 60


def test_only_the_ranges_asked_for_are_cut():
    data = bytes(range(100))
    parts = [parse_chunk(part) for part in cut(blob_ref(data), data, ((90, 300), (5, 5), (9, 3), (10, 12)))]
    assert [(part.offset, bytes(part.data)) for part in parts] == [(90, data[90:]), (10, data[10:12])]


@given(st.data())
def test_any_order_duplicates_and_cuts_give_the_blob(data):
    blob = data.draw(st.binary(min_size=1, max_size=400))
    ref = blob_ref(blob)
    payloads = [part for size in data.draw(st.lists(st.integers(1, 450), min_size=1, max_size=3))
                for part in cut(ref, blob, chunk_bytes=size)]  # fmt: skip
    payloads += data.draw(st.lists(st.sampled_from(payloads), max_size=5))
    assembler = assemble(ref, data.draw(st.permutations(payloads)))
    assert assembler.missing() == []
    assert assembler.finish() == blob


@given(st.data())
def test_asking_for_what_is_missing_completes_it(data):
    blob = data.draw(st.binary(min_size=1, max_size=400))
    ref = blob_ref(blob)
    payloads = list(cut(ref, blob, chunk_bytes=data.draw(st.integers(1, 60))))
    kept = data.draw(st.lists(st.sampled_from(payloads), max_size=len(payloads)))
    assembler = assemble(ref, kept)
    have = set().union(*(range(c.offset, c.offset + len(c.data)) for c in map(parse_chunk, kept)))
    assert assembler.begun is bool(kept)
    missing = assembler.missing()
    assert {i for start, stop in missing for i in range(start, stop)} == set(range(len(blob))) - have
    assert missing == sorted(missing)
    for part in cut(ref, blob, missing, chunk_bytes=data.draw(st.integers(1, 60))):
        assembler.add(parse_chunk(part))
    assert assembler.finish() == blob


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_blob_errors(payload):
    with pytest.raises(BlobError):
        parse_chunk(payload)


@given(st.data())
def test_a_damaged_chunk_is_refused_or_of_another_blob(data):
    blob = b"some bytes that matter"
    ref = blob_ref(blob)
    payload = bytearray(next(cut(ref, blob)))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    if position == 3:
        return  # the reserved byte means nothing
    assembler = Assembler(ref, limit=100)
    with pytest.raises(BlobError):
        assembler.add(parse_chunk(bytes(payload)))
    assert assembler.missing() == [(0, len(blob))]


HUGE = 2**64 - 1


@pytest.mark.parametrize(("offset", "size"), [(0, 3), (HUGE, HUGE), (HUGE, 4), (HUGE - 4, HUGE), (1, 4)], ids=str)
def test_a_chunk_outside_its_blob_is_refused_and_takes_no_memory(offset, size):
    ref = BlobRef(digest=bytes(32), size=4)
    with pytest.raises(BlobError):
        Assembler(ref, limit=10).add(parse_chunk(chunk(b"abcd", digest=ref.digest, offset=offset, size=size)))


def test_an_announced_size_beyond_the_limit_is_refused_before_memory_is_taken():
    with pytest.raises(BlobError, match="exceeds the limit of 10"):
        Assembler(BlobRef(digest=bytes(32), size=2**53), limit=10)


def test_an_empty_chunk_is_refused():
    with pytest.raises(BlobError, match="shorter"):
        parse_chunk(chunk(b"", digest=bytes(32), offset=0, size=0))


@pytest.mark.parametrize("change", [{"magic": b"XX"}, {"version": 2}])
def test_another_format_is_refused(change):
    with pytest.raises(BlobError, match="another version"):
        parse_chunk(chunk(b"a", digest=bytes(32), offset=0, size=1, **change))


def test_chunks_of_another_blob_under_this_name_are_found_out_and_the_right_ones_still_work():
    blob, forged = b"the right bytes", b"the wrong bytes"
    ref = blob_ref(blob)
    assembler = assemble(ref, [chunk(forged, digest=ref.digest, offset=0, size=len(blob))])
    with pytest.raises(BlobError, match="another blob"):
        assembler.finish()
    assert assembler.missing() == [(0, len(blob))], "it starts from nothing"
    assert not assembler.begun
    for part in cut(ref, blob):
        assembler.add(parse_chunk(part))
    assert assembler.finish() == blob


def test_incomplete_is_not_finished():
    ref = blob_ref(b"abc")
    with pytest.raises(BlobError, match="incomplete"):
        Assembler(ref, limit=10).finish()


def test_the_empty_blob_needs_no_chunk():
    ref = blob_ref(b"")
    assert list(cut(ref, b"")) == []
    assert Assembler(ref, limit=0).finish() == b""


def test_many_small_pieces_in_the_worst_order_stay_cheap():
    blob = bytes(20_000)
    ref = blob_ref(blob)
    assembler = Assembler(ref, limit=len(blob))
    pieces = [parse_chunk(part) for part in cut(ref, blob, chunk_bytes=10)]
    for piece in pieces[::2] + pieces[1::2]:
        assembler.add(piece)
    assert assembler.finish() == blob

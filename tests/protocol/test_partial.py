"""Blobs that arrive on the disk: resumed after any end, verified whatever the files say."""

from __future__ import annotations

import hashlib
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgetrain.protocol.blobs import blob_ref, cut, make_chunk, parse_chunk
from edgetrain.protocol.errors import BlobError
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.partial import PartialBlob

DATA = bytes(i * 7 % 251 for i in range(5000))
REF = blob_ref(DATA)


def chunks(*ranges, data=DATA, ref=REF, size=700):
    return [parse_chunk(part) for part in cut(ref, data, ranges, size)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_order_with_restarts_in_between_gives_the_blob(ram_path, data):
    directory = Path(tempfile.mkdtemp(dir=ram_path))
    pieces = data.draw(st.permutations(chunks() + chunks(size=900)))
    blob = PartialBlob(REF, directory, limit=5000)
    for piece in pieces:
        if data.draw(st.booleans()):
            blob = PartialBlob(REF, directory, limit=5000)
        blob.add(piece)
    assert blob.complete
    assert blob.finish() == DATA
    assert list(directory.iterdir()) == []


def test_a_restart_knows_what_is_missing(tmp_path):
    blob = PartialBlob(REF, tmp_path, limit=5000)
    for piece in chunks((700, 2100), (4000, 5000)):
        blob.add(piece)
    missing = [(0, 700), (2100, 4000)]
    assert blob.missing() == missing
    assert PartialBlob(REF, tmp_path, limit=5000).missing() == missing


def test_what_a_power_cut_took_is_asked_for_again(tmp_path):
    blob = PartialBlob(REF, tmp_path, limit=5000)
    for piece in chunks():
        blob.add(piece)
    part, have = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    damaged = bytearray(part.read_bytes())
    damaged[1500] ^= 1  # in the third chunk, [1400, 2100)
    part.write_bytes(damaged[:4800])  # the last chunk, [4200, 4900), and the one after it are cut
    have.write_bytes(have.read_bytes() + b"half")
    again = PartialBlob(REF, tmp_path, limit=5000)
    assert again.missing() == [(1400, 2100), (4200, 5000)]
    for piece in chunks(*again.missing()):
        again.add(piece)
    assert PartialBlob(REF, tmp_path, limit=5000).missing() == []
    again.finish_to(tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


@pytest.mark.parametrize("junk", [b"", b"\xff" * 400, bytes(400)])
def test_rubbish_in_the_files_is_no_error(tmp_path, junk):
    for suffix in (".part", ".have"):
        (tmp_path / (REF.digest.hex() + suffix)).write_bytes(junk)
    blob = PartialBlob(REF, tmp_path, limit=5000)
    for piece in chunks(*blob.missing()):
        blob.add(piece)
    assert blob.finish() == DATA


def test_chunks_of_something_else_and_wrong_sums_are_refused(tmp_path):
    with pytest.raises(BlobError, match="exceeds the limit"):
        PartialBlob(REF, tmp_path, limit=4999)
    blob = PartialBlob(REF, tmp_path, limit=5000)
    with pytest.raises(BlobError, match="another blob"):
        blob.add(parse_chunk(make_chunk(blob_ref(b"x"), 0, b"x")))
    with pytest.raises(BlobError, match="another blob"):
        blob.add(parse_chunk(make_chunk(BlobRef(digest=REF.digest, size=4000), 0, b"x")))
    with pytest.raises(BlobError, match="incomplete"):
        blob.finish()
    for piece in chunks(data=bytes(5000)):
        blob.add(piece)
    with pytest.raises(BlobError, match="add up to another blob"):
        blob.finish()
    assert blob.missing() == [(0, 5000)]


def test_the_empty_blob(tmp_path):
    blob = PartialBlob(blob_ref(b""), tmp_path, limit=0)
    assert blob.complete
    blob.finish_to(tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_memory_does_not_grow_with_the_blob(tmp_path):
    """24 MB in chunks of 60 KiB: less than 1 MB at any moment."""
    size, block = 24 << 20, 60 << 10
    digest = hashlib.sha256()
    for start in range(0, size, block):
        digest.update(bytes([start // block % 256]) * min(block, size - start))
    ref = BlobRef(digest=digest.digest(), size=size)
    tracemalloc.start()
    blob = PartialBlob(ref, tmp_path, limit=size)
    for start in range(0, size, block):
        data = bytes([start // block % 256]) * min(block, size - start)
        blob.add(parse_chunk(make_chunk(ref, start, data)))
    again = PartialBlob(ref, tmp_path, limit=size)
    again.finish_to(tmp_path / "blob")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "blob").stat().st_size == size
    assert peak < 1 << 20

"""The journal: whatever is torn off its end, what was whole before is still there."""

from __future__ import annotations

import errno
import struct
import tracemalloc
import zlib

import msgspec
import pytest

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.journal import Journal, RoundOpened, UpdateAccepted, read_journal

OPENED = RoundOpened(run=bytes(16), round=3, nonce=b"n" * 16, parameters=b"p" * 32)
RECORDS = [
    (OPENED, b""),
    (UpdateAccepted(client="a", envelope=b"signed a"), b"update of a"),
    (UpdateAccepted(client="b", envelope=b"signed b"), b"update of b, which is longer"),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "round.journal"
    journal = Journal(path)
    for meta, payload in RECORDS:
        journal.append(meta, payload)
    journal.commit()
    journal.close()
    return path


def ends():
    """Where each record ends, from the format's description."""
    end, result = 0, []
    for meta, payload in RECORDS:
        end += 20 + len(msgspec.msgpack.encode(meta)) + len(payload)
        result.append(end)
    return result


def test_what_was_appended_is_read(path):
    assert list(read_journal(path)) == RECORDS


def test_the_format_is_as_documented(path):
    meta, payload = msgspec.msgpack.encode(OPENED), b""
    record = struct.pack("<2sBBIQI", b"EJ", 1, 0, len(meta), 0, zlib.crc32(meta + payload)) + meta
    assert path.read_bytes().startswith(record)
    assert path.stat().st_size == ends()[-1]


def test_a_tail_torn_at_any_byte_costs_the_torn_record_only(path):
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = sum(end <= length for end in ends())
        assert list(read_journal(path)) == RECORDS[:whole], length
        journal = Journal(path)
        journal.append(*RECORDS[-1])
        journal.close()
        assert list(read_journal(path)) == [*RECORDS[:whole], RECORDS[-1]], length


def test_any_damaged_byte_costs_its_record_and_what_follows(path):
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        found = list(read_journal(path))
        record = next(index for index, end in enumerate(ends()) if position < end)
        start = [0, *ends()][record]
        if position == start + 3:
            assert found == RECORDS  # the reserved byte means nothing
        else:
            assert found == RECORDS[:record], position


@pytest.mark.parametrize("tail", [bytes(500), b"EJ\x01\x00" + bytes(400), b"\xff" * 50], ids=["zeros", "empty", "ones"])
def test_a_tail_of_rubbish_is_cut_off(path, tail):
    with path.open("ab") as file:
        file.write(tail)
    Journal(path).close()
    assert path.stat().st_size == ends()[-1]
    assert list(read_journal(path)) == RECORDS


def test_a_header_that_claims_gigabytes_takes_no_memory(path):
    with path.open("ab") as file:
        file.write(struct.pack("<2sBBIQI", b"EJ", 1, 0, 1 << 20, 1 << 34, 0) + b"x" * 100)
    tracemalloc.start()
    assert list(read_journal(path)) == RECORDS
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_full_disk_leaves_the_journal_as_it_was(path):
    """/dev/full refuses every write; a real file that refuses half-way is cut back."""
    journal = Journal(path)

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if len(data) <= 30:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[: len(data) - 30])

        def __getattr__(self, name):
            return getattr(self.file, name)

    real, journal._file = journal._file, Full(journal._file)
    with pytest.raises(RunError, match="No space left"):
        journal.append(*RECORDS[-1])
    journal._file = real
    assert list(read_journal(path)) == RECORDS
    journal.append(*RECORDS[-1])
    journal.close()
    assert list(read_journal(path)) == [*RECORDS, RECORDS[-1]]


def test_a_disk_that_does_not_sync_is_an_error(path, monkeypatch):
    journal = Journal(path)

    def fail(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunError, match="cannot sync"):
        journal.commit()
    journal.close()


def test_where_no_journal_can_be_is_an_error(tmp_path):
    with pytest.raises(RunError, match="cannot open"):
        Journal(tmp_path / "none" / "x.journal")


def test_an_unknown_kind_of_record_ends_the_reading(path):
    """Of a later version: better to stop than to guess."""
    meta = msgspec.msgpack.encode({"type": "later"})
    with path.open("ab") as file:
        file.write(struct.pack("<2sBBIQI", b"EJ", 1, 0, len(meta), 0, zlib.crc32(meta)) + meta)
    assert list(read_journal(path)) == RECORDS

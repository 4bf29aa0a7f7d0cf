"""The journal: whatever is torn off its end, what was whole before is still there."""

from __future__ import annotations

import errno
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.journal import Journal, RoundOpened, UpdateAccepted
from edgetrain.coordinator.run.journal_reading import JournalReader, read_journal

SALT = b"s" * 16
OPENED = RoundOpened(run=bytes(16), round=3, nonce=b"n" * 16, parameters=b"p" * 32, salt=SALT)
RECORDS = [
    (OPENED, b""),
    (UpdateAccepted(client="a", envelope=b"signed a"), b"update of a"),
    (UpdateAccepted(client="b", envelope=b"signed b"), b"update of b, which is longer"),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "round.journal"
    journal = Journal(path, salt=SALT)
    for meta, payload in RECORDS:
        journal.append(meta, payload)
    journal.commit()
    journal.close()
    return path


def reopened(path):
    """As after a restart."""
    reader = JournalReader(path)
    list(reader)
    return Journal(path, length=reader.length, salt=SALT)


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
        journal = reopened(path)
        if not whole:
            journal.append(*RECORDS[0])
        journal.append(*RECORDS[-1])
        journal.close()
        assert list(read_journal(path)) == [*RECORDS[: max(whole, 1)], RECORDS[-1]], length


def test_any_damaged_byte_costs_its_record_only(path):
    data = path.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        reader = JournalReader(path, OPENED)
        found = list(reader)
        record = next(index for index, end in enumerate(ends()) if position < end)
        start = [0, *ends()][record]
        if position == start + 3:
            assert found == RECORDS  # the reserved byte means nothing
            continue
        assert found == RECORDS[:record] + RECORDS[record + 1 :], position
        last = record == len(RECORDS) - 1
        assert (reader.length, reader.lost) == ((start, 0) if last else (len(data), ends()[record] - start))
        journal = Journal(path, length=reader.length, salt=SALT)
        journal.append(*RECORDS[1])
        journal.close()
        assert list(JournalReader(path, OPENED)) == [*RECORDS[:record], *RECORDS[record + 1 :], RECORDS[1]]


@pytest.mark.parametrize("length", [1, 7, 300])
def test_bytes_that_are_missing_or_too_many_cost_their_record_only(path, length):
    """The reader does not trust a length: it searches."""
    data = path.read_bytes()
    middle = ends()[0] + 30
    for damaged in (data[:middle] + data[middle + min(length, 40) :], data[:middle] + b"x" * length + data[middle:]):
        path.write_bytes(damaged)
        assert list(read_journal(path)) == [RECORDS[0], RECORDS[2]]


def test_what_a_client_sent_is_never_taken_for_a_record(path):
    """An update that holds a journal: after damage to its own record, the search comes upon what is in it."""
    forged = msgspec.msgpack.encode(UpdateAccepted(client="c", envelope=b"forged"))
    inner = struct.pack("<2sBBIQI", b"EJ", 1, 0, len(forged), 4, zlib.crc32(forged + b"evil")) + forged + b"evil"
    journal = reopened(path)
    journal.append(UpdateAccepted(client="mallory", envelope=b"signed"), inner * 3)
    journal.append(*RECORDS[1])
    journal.close()
    data = bytearray(path.read_bytes())
    data[ends()[-1]] ^= 0xFF
    path.write_bytes(data)
    assert list(read_journal(path)) == [*RECORDS, RECORDS[1]]


def test_the_search_for_whole_records_has_an_end(path):
    """An update of ten thousand headers, each of which claims all that follows."""
    journal = reopened(path)
    header = struct.pack("<2sBBIQI", b"EJ", 1, 0, 10, 100_000, 0)
    journal.append(UpdateAccepted(client="mallory", envelope=b"signed"), header * 10_000)
    journal.append(*RECORDS[1])
    journal.close()
    data = bytearray(path.read_bytes())
    data[ends()[-1]] ^= 0xFF
    path.write_bytes(data)
    read = []

    class Counting(JournalReader):
        def _read(self, file, position, size):
            read.append(position)
            return super()._read(file, position, size)

    assert list(Counting(path))[:3] == RECORDS
    assert len(read) < 50, "eight times the file, in pieces of 100 kB"


@pytest.mark.parametrize("tail", [bytes(500), b"EJ\x01\x00" + bytes(400), b"\xff" * 50], ids=["zeros", "empty", "ones"])
def test_a_tail_of_rubbish_is_cut_off(path, tail):
    with path.open("ab") as file:
        file.write(tail)
    reopened(path).close()
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
    journal = reopened(path)

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
    journal.append(*RECORDS[-1])
    with pytest.raises(RunError, match="No space left"):
        journal.commit()
    journal._file = real
    assert list(read_journal(path)) == RECORDS
    journal.commit()
    assert list(read_journal(path)) == [*RECORDS, RECORDS[-1]], "what could not be written was not forgotten"
    journal.close()
    assert list(read_journal(path)) == [*RECORDS, RECORDS[-1]]


def test_what_is_held_is_bounded(path):
    """A record that is large is in the file at once, with those before it."""
    journal = reopened(path)
    journal.append(*RECORDS[1])
    assert list(read_journal(path)) == RECORDS, "not written yet"
    large = (UpdateAccepted(client="c", envelope=b"signed c"), bytes(1 << 20))
    journal.append(*large)
    assert list(read_journal(path)) == [*RECORDS, RECORDS[1], large]
    journal.close()


def test_what_is_flushed_outlives_the_process(path):
    journal = reopened(path)
    journal.append(*RECORDS[1])
    journal.flush()
    assert list(read_journal(path)) == [*RECORDS, RECORDS[1]]
    journal.close()


def test_records_keep_their_order_while_another_thread_commits(path):
    journal = reopened(path)
    added = [(UpdateAccepted(client=f"c{number}", envelope=b"signed"), bytes(20_000)) for number in range(300)]
    with ThreadPoolExecutor(1) as thread:
        committing = [thread.submit(journal.commit)]
        for meta, payload in added:
            journal.append(meta, payload)
            if committing[-1].done():
                committing.append(thread.submit(journal.commit))
        for commit in committing:
            commit.result()
    journal.close()
    assert list(read_journal(path)) == RECORDS + added


def test_a_disk_that_does_not_sync_is_an_error(path, monkeypatch):
    journal = reopened(path)

    def fail(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunError, match="cannot sync"):
        journal.commit()
    journal.close()


def test_where_no_journal_can_be_is_an_error(tmp_path):
    with pytest.raises(RunError, match="cannot open"):
        Journal(tmp_path / "none" / "x.journal")


def test_an_unknown_kind_of_record_is_an_error(path):
    """Of a later version: better to stop than to guess, or to cut it off."""
    meta = msgspec.msgpack.encode({"type": "later"})
    with path.open("ab") as file:
        file.write(struct.pack("<2sBBIQI", b"EJ", 1, 0, len(meta), 0, zlib.crc32(SALT + meta)) + meta)
    with pytest.raises(RunError, match=r"of a later version.*or a newer one"):
        list(read_journal(path))

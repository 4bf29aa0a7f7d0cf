"""The audit log: whatever is done to its bytes is found, and a crash costs nothing that anybody was told."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys

import pytest

import edgetrain.coordinator.audit.log as log_module
from edgetrain.coordinator.audit import AuditError, AuditLog, verify_audit
from edgetrain.coordinator.audit.chain import HEAD_BYTES
from edgetrain.coordinator.audit.records import Aggregated, Command, Opened
from edgetrain.coordinator.audit.verify import records_of
from edgetrain.coordinator.errors import RunError
from edgetrain.protocol.ed25519 import is_signed
from edgetrain.protocol.signing import SigningKey

KEY, OTHER = SigningKey(b"k" * 32), SigningKey(b"o" * 32)
RUN = bytes(range(16))


def opened(key=KEY):
    return Opened(run=RUN.hex(), federation="f", bundle="00" * 32, public_key=key.public_key.hex())


def open_log(path, key=KEY):
    return AuditLog(path, key=key, opened=opened(key), clock=lambda: 1_700_000_000.25)


@pytest.fixture
def small(ram_path):
    """A log of two batches: opened, pause, seal, aggregated, resume, seal."""
    log = open_log(ram_path)
    log.append(Command(command="pause"))
    log.commit()
    log.append(Aggregated(round=1, accepted=2, parameters="ab" * 32))
    log.append(Command(command="resume"))
    log.close()
    return ram_path


def rewrite(path, data, name="audit.jsonl"):
    (path / name).write_bytes(data)


def broken(path):
    with pytest.raises(AuditError):
        verify_audit(path, public_key=KEY.public_key)
    return True


def test_the_lines_are_what_the_documentation_says(small):
    lines = (small / "audit.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["type"] for record in records] == ["opened", "command", "seal", "aggregated", "command", "seal"]
    assert [record["n"] for record in records] == list(range(6))
    assert records[1]["at"] == "2023-11-14T22:13:20.250Z"
    previous = hashlib.sha256(b"edgetrain audit 1\0" + RUN).digest()
    for line, record in zip(lines, records, strict=True):
        if record["type"] == "seal":
            signed = b"edgetrain audit seal 1\0" + RUN + record["n"].to_bytes(8, "little") + previous
            assert is_signed(KEY.public_key, signed, bytes.fromhex(record["signature"]))
        assert line.endswith(b',"hash":"' + record["hash"].encode() + b'"}')
        previous = hashlib.sha256(previous + line[: line.index(b',"hash"')]).digest()
        assert previous.hex() == record["hash"]
    head = (small / "audit.head").read_bytes()
    assert len(head) == HEAD_BYTES
    assert head.split()[5:7] == [b"%020d" % 6, previous.hex().encode()]
    report = verify_audit(small, public_key=KEY.public_key)
    assert (report.records, report.kinds["command"], report.run) == (6, 2, RUN.hex())


def test_any_edited_byte_is_found(small):
    for name in ("audit.jsonl", "audit.head"):
        whole = (small / name).read_bytes()
        for position, flip in itertools.product(range(len(whole)), (1, 0x20)):
            rewrite(small, whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :], name)
            assert broken(small), (name, position, flip)
        rewrite(small, whole, name)
    verify_audit(small, public_key=KEY.public_key)


def test_any_deleted_inserted_or_doubled_byte_is_found(small):
    for name in ("audit.jsonl", "audit.head"):
        whole = (small / name).read_bytes()
        for position in range(len(whole)):
            byte = whole[position : position + 1]
            for middle in (b"", byte + b"\n", byte + byte):
                changed = whole[:position] + middle + whole[position + 1 :]
                rewrite(small, changed, name)
                assert broken(small), (name, position, middle)
        rewrite(small, whole, name)


def test_any_truncation_is_found_also_at_a_seal(small):
    for name in ("audit.jsonl", "audit.head"):
        whole = (small / name).read_bytes()
        for length in range(len(whole)):
            rewrite(small, whole[:length], name)
            assert broken(small), (name, length)
        rewrite(small, whole, name)


def test_any_other_order_doubled_or_missing_lines_are_found(small):
    lines = (small / "audit.jsonl").read_bytes().splitlines(keepends=True)
    orders = [list(order) for order in itertools.permutations(range(6))]
    orders += [list(order) for order in itertools.islice(itertools.product(range(6), repeat=6), 0, None, 97)]
    orders += [[*range(index), *range(index + 1, 6)] for index in range(6)]
    orders += [[*range(index), index, *range(index, 6)] for index in range(6)]
    for order in orders:
        if order != list(range(6)):
            rewrite(small, b"".join(lines[index] for index in order))
            assert broken(small), order


def test_a_missing_head_is_found_and_its_start_says_so(small):
    (small / "audit.head").unlink()
    assert broken(small)
    open_log(small).close()
    verify_audit(small, public_key=KEY.public_key)
    assert next(record for record in records_of(small) if record["type"] == "recovered")["head_lost"] is True


def test_lines_that_somebody_else_appends_are_found_and_cut(small):
    """Their hashes are right: anybody can compute those."""
    whole = (small / "audit.jsonl").read_bytes()
    previous = bytes.fromhex(json.loads(whole.splitlines()[-1])["hash"])
    body = b'{"n":6,"at":"x","type":"command","command":"stop"}'
    digest = hashlib.sha256(previous + body[:-1]).hexdigest()
    forged = whole + body[:-1] + f',"hash":"{digest}"}}\n'.encode()
    rewrite(small, forged)
    with pytest.raises(AuditError, match="after line 6 are not sealed"):
        verify_audit(small, public_key=KEY.public_key)
    open_log(small).close()
    report = verify_audit(small, public_key=KEY.public_key)
    assert report.kinds["command"] == 2
    [cut] = [record for record in records_of(small) if record["type"] == "recovered"]
    assert cut["cut_bytes"] == len(forged) - len(whole)
    assert cut["cut_sha256"] == hashlib.sha256(forged[len(whole) :]).hexdigest()


def test_a_log_rewritten_with_another_key_is_found_by_the_key(small, tmp_path):
    path = tmp_path / "other"
    path.mkdir()
    open_log(path, OTHER).close()
    verify_audit(path)
    with pytest.raises(AuditError, match="is sealed by key"):
        verify_audit(path, public_key=KEY.public_key)


def test_an_older_copy_of_everything_is_found_by_what_a_client_has_seen(small):
    old = {name: (small / name).read_bytes() for name in ("audit.jsonl", "audit.head")}
    log = open_log(small)
    log.append(Command(command="stop"))
    seen = log.note_checkpoint()
    log.commit()
    log.close()
    report = verify_audit(small, public_key=KEY.public_key, seen={seen.records: seen.hash})
    assert report.compared == 1
    for name, data in old.items():
        rewrite(small, data, name)
    verify_audit(small, public_key=KEY.public_key)
    with pytest.raises(AuditError, match=f"a client has seen {seen.records} lines"):
        verify_audit(small, public_key=KEY.public_key, seen={seen.records: seen.hash})
    log = open_log(small)
    for _ in range(5):
        log.append(Command(command="pause"))
    log.close()
    with pytest.raises(AuditError, match="another log than the one that a client has seen"):
        verify_audit(small, public_key=KEY.public_key, seen={seen.records: seen.hash})


def test_a_checkpoint_is_told_when_the_next_commit_has_it_on_the_disk(small):
    log = open_log(small)
    log.append(Command(command="pause"))
    point = log.note_checkpoint()
    assert list(log.checkpoints) == []
    assert (point, point.records) == (log.sealed, 8)
    log.append(Command(command="resume"))
    log.commit()
    assert list(log.checkpoints) == [point]
    log.close()
    kinds = [json.loads(line)["type"] for line in (small / "audit.jsonl").read_bytes().splitlines()][6:]
    assert kinds == ["command", "seal", "checkpoint", "command", "seal"]
    again = open_log(small)
    assert list(again.checkpoints) == [point]
    again.close()


# --- crashes -----------------------------------------------------------------------------------------


def test_a_crash_at_any_byte_of_a_batch_leaves_what_was_sealed(small):
    """Bytes of the third batch, the head still of the second: what a kill or a power cut leaves."""
    sealed, head = (small / "audit.jsonl").read_bytes(), (small / "audit.head").read_bytes()
    log = open_log(small)
    log.append(Command(command="stop"))
    log.append(Command(command="pause"))
    log.close()
    batch = (small / "audit.jsonl").read_bytes()[len(sealed) :]
    for length in range(len(batch) + 1):
        rewrite(small, sealed + batch[:length])
        rewrite(small, head, "audit.head")
        if 0 < length < len(batch):
            assert broken(small), length
        open_log(small).close()
        report = verify_audit(small, public_key=KEY.public_key)
        assert report.kinds["command"] == (4 if length == len(batch) else 2), length
        assert report.kinds["recovered"] == (0 < length < len(batch)), length


def test_a_log_that_was_edited_is_not_gone_on_with(small):
    whole = (small / "audit.jsonl").read_bytes()
    rewrite(small, whole.replace(b'"resume"', b'"delete"'))
    with pytest.raises(RunError, match=r"audit\.jsonl: was changed after it was written: line 5.*Restore it"):
        open_log(small)
    lines = whole.splitlines(keepends=True)
    rewrite(small, b"".join(lines[:3]))
    with pytest.raises(RunError, match="was changed after it was written"):
        open_log(small)
    (small / "audit.jsonl").unlink()
    with pytest.raises(RunError, match="is gone"):
        open_log(small)


def test_another_key_does_not_go_on_with_a_log(small):
    with pytest.raises(RunError, match="no line of it was sealed by this coordinator's key"):
        open_log(small, OTHER)


def test_a_full_disk_is_an_error_and_the_batch_comes_later(small, monkeypatch):
    log = open_log(small)
    log.append(Command(command="stop"))

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left"):
            log.commit()
    assert verify_audit(small, public_key=KEY.public_key).records == 6
    log.close()
    assert verify_audit(small, public_key=KEY.public_key).kinds["command"] == 3


def test_a_batch_whose_writer_gave_up_comes_later_too(small, monkeypatch):
    log = open_log(small)
    log.append(Command(command="stop"))

    def give_up(_descriptor):
        raise MemoryError("no room for anything")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", give_up)
        with pytest.raises(MemoryError):
            log.commit()
    log.append(Command(command="pause"))
    log.close()
    assert verify_audit(small, public_key=KEY.public_key).kinds["command"] == 4


def test_what_is_recorded_while_the_disk_is_written_comes_after_it_also_if_that_fails(small, monkeypatch):
    log = open_log(small)
    before = log.sealed

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    log.append(Command(command="stop"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        log.begin_commit()
        log.append(Command(command="interrupt"))
        with pytest.raises(RunError, match="No space left"):
            log.end_commit()
    assert log.sealed == before
    assert verify_audit(small, public_key=KEY.public_key).records == 6
    log.begin_commit()
    log.append(Command(command="pause"))
    log.end_commit()
    log.end_commit()
    # The first batch with the seal that it had, the second with its own.
    lines = [json.loads(line) for line in (small / "audit.jsonl").read_bytes().splitlines()[6:]]
    assert [line.get("command", line["type"]) for line in lines] == ["stop", "seal", "interrupt", "seal"]
    assert verify_audit(small, public_key=KEY.public_key).records == 10 == log.sealed.records
    log.close()
    assert verify_audit(small, public_key=KEY.public_key).kinds["command"] == 5


@contextlib.contextmanager
def interrupted_at(moment):
    """A KeyboardInterrupt before the bytecode instruction of that number, of those in the log's own module."""
    numbers = itertools.count()

    def trace(frame, event, _argument):
        if frame.f_code.co_filename != log_module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(numbers) == moment:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_an_interruption_between_any_two_instructions_loses_and_doubles_nothing(ram_path):
    commands = ["resume", "pause", "stop"]
    for moment in itertools.count():
        path = ram_path / str(moment)
        path.mkdir()
        log = open_log(path)
        try:
            with interrupted_at(moment):
                for command in commands:
                    log.append(Command(command=command))
                    log.begin_commit()
                log.note_checkpoint()
                log.commit()
        except KeyboardInterrupt:
            log.append(Command(command="interrupt"))
        else:
            log.close()
            break
        log.close()
        verify_audit(path, public_key=KEY.public_key)
        told = [record["command"] for record in records_of(path) if record["type"] == "command"]
        assert told == [*commands[: len(told) - 1], "interrupt"], moment
        points = [record["records"] for record in records_of(path) if record["type"] == "checkpoint"]
        again = open_log(path)
        assert [point.records for point in log.checkpoints] == [point.records for point in again.checkpoints] == points
        again.close()
    assert moment > 500


def test_no_room_for_data(small):
    log = open_log(small)
    with pytest.raises(ValueError, match="4096"):
        log.append(Command(command="x" * 5000))
    log.close()

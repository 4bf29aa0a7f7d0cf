r"""The chain: the form of a line, and what its hash, a seal and the head file say. Pure.

audit.jsonl is a JSON object per line:

    {"n": 0, "at": "2026-01-01T00:00:00.000Z", "type": "opened", …, "hash": "…"}

`n` counts the lines. `hash` always comes last: SHA-256 over the 32 bytes of the hash before it and the line's
bytes up to (not including) `,"hash"`. Before line 0 stands SHA-256("edgetrain audit 1" 00 run). So every byte of
every line is in the hash of the last line.

Whoever can write the file can compute hashes, so lines come in batches that end in a seal: a line of type "seal"
whose `signature` is Ed25519 by the coordinator over

    "edgetrain audit seal 1" 00 run | n, u64 little-endian | hash of the line before

Lines after the last seal are not part of the log: a crash has left them, or somebody else has.

A file that was cut at an earlier seal would still look whole. Therefore audit.head, one line of fixed length, is
overwritten after every seal, with another signature that no line of the log holds:

    edgetrain audit head 1 RUN RECORDS(20 digits) HASH SIGNATURE\n
    "edgetrain audit head 1" 00 run | records, u64 little-endian | hash of the last line

Who restores an older copy of both is found out by the checkpoints that clients remember.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgetrain.coordinator.errors import CoordinatorError
from edgetrain.protocol.ed25519 import is_signed
from edgetrain.protocol.signing import SigningKey

LOG_FILE, HEAD_FILE = "audit.jsonl", "audit.head"
MAX_LINE_BYTES = 4096
BLOCK_BYTES = 1 << 20
_SEAL = b"edgetrain audit seal 1\0"
_HEAD = b"edgetrain audit head 1\0"
_HASH = b',"hash":"'
# `,"hash":"` + 64 hex digits + `"}`
_SUFFIX_BYTES = len(_HASH) + 64 + 2
_HEAD_LINE = re.compile(rb"edgetrain audit head 1 ([0-9a-f]{32}) ([0-9]{20}) ([0-9a-f]{64}) ([0-9a-f]{128})\n")
HEAD_BYTES = 23 + 32 + 1 + 20 + 1 + 64 + 1 + 128 + 1


class AuditError(CoordinatorError):
    """An audit log that is not what its coordinator wrote; says where."""


class Line(msgspec.Struct, frozen=True, gc=False):  # a million of them: half the time of a dataclass
    """A line whose place in the chain is right."""

    n: int
    type: str
    # Up to and with its newline, in the file.
    end: int
    hash: bytes
    # The bytes without their newline.
    text: bytes


class Head(msgspec.Struct, frozen=True, gc=False):
    """The log's length and the hash of its last line."""

    records: int
    hash: bytes


class _Fields(msgspec.Struct, frozen=True):
    n: int
    type: str


class _Seal(msgspec.Struct, frozen=True):
    signature: str


_decode_fields = msgspec.json.Decoder(_Fields).decode


def genesis(run: bytes) -> bytes:
    """What stands before the first line."""
    return hashlib.sha256(b"edgetrain audit 1\0" + run).digest()


def chained(previous: bytes, body: bytes) -> tuple[bytes, bytes]:
    """(line with its newline, its hash) of a JSON object, after the line with hash `previous`."""
    record = body[:-1]
    digest = hashlib.sha256(previous + record)
    return record + _HASH + digest.hexdigest().encode() + b'"}\n', digest.digest()


def seal_signature(key: SigningKey, run: bytes, after: Head) -> str:
    """Of the seal that follows so many lines."""
    return key.sign(_signed(_SEAL, run, after)).hex()


def is_sealed(line: Line, previous: bytes, run: bytes, public_key: bytes) -> bool:
    """Whether a line is a seal with the coordinator's signature."""
    try:
        signature = bytes.fromhex(msgspec.json.decode(line.text, type=_Seal).signature)
    except (msgspec.DecodeError, ValueError):
        return False
    return is_signed(public_key, _signed(_SEAL, run, Head(line.n, previous)), signature)


def encode_head(key: SigningKey, run: bytes, head: Head) -> bytes:
    """The head file, of `HEAD_BYTES` bytes."""
    signature = key.sign(_signed(_HEAD, run, head)).hex()
    return f"edgetrain audit head 1 {run.hex()} {head.records:020d} {head.hash.hex()} {signature}\n".encode()


def read_head(directory: Path, run: bytes, public_key: bytes) -> Head:
    """Reads a run's head file.

    Raises:
        AuditError: see `decode_head`.
        OSError: not there or not readable.
    """
    with (directory / HEAD_FILE).open("rb") as file:
        return decode_head(file.read(HEAD_BYTES + 1), run, public_key)


def decode_head(data: bytes, run: bytes, public_key: bytes) -> Head:
    """Reads the head file.

    Raises:
        AuditError: not one, of another run, or the coordinator did not sign it.
    """
    found = _HEAD_LINE.fullmatch(data)
    if not found or bytes.fromhex(found[1].decode()) != run:
        raise AuditError("is damaged, or of another run")
    head = Head(int(found[2]), bytes.fromhex(found[3].decode()))
    if head.records >= 1 << 64 or not is_signed(
        public_key, _signed(_HEAD, run, head), bytes.fromhex(found[4].decode())
    ):
        raise AuditError("was not signed by the coordinator")
    return head


def read_lines(file: BinaryIO, run: bytes) -> Iterator[Line]:
    """The lines of a log, each with its place in the chain checked; seals are for the caller to check.

    Memory: a block, whatever the file holds.

    Raises:
        AuditError: a line that is torn, too long, no record, or not the one that was written here.
    """
    previous, number, end, rest = genesis(run), 0, 0, b""
    while block := file.read(BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        for text in lines:
            body = text[:-_SUFFIX_BYTES]
            digest = hashlib.sha256(previous + body)
            if text[-_SUFFIX_BYTES:] != _HASH + digest.hexdigest().encode() + b'"}' or len(text) >= MAX_LINE_BYTES:
                raise AuditError(f"line {number + 1} is not the one that was written there")
            try:
                fields = _decode_fields(text)
            except (msgspec.DecodeError, RecursionError) as error:
                raise AuditError(f"line {number + 1} is no record: {error}") from error
            if fields.n != number:
                raise AuditError(f"line {number + 1} says that it is line {fields.n + 1}")
            previous = digest.digest()
            end += len(text) + 1
            yield Line(number, fields.type, end, previous, text)
            number += 1
        if len(rest) > MAX_LINE_BYTES:
            raise AuditError(f"line {number + 1} is longer than any record")
    if rest:
        raise AuditError(f"line {number + 1} is torn: {len(rest)} bytes without an end")


def _signed(domain: bytes, run: bytes, head: Head) -> bytes:
    return domain + run + head.records.to_bytes(8, "little") + head.hash

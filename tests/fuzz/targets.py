"""What is fuzzed: for each decoder, first inputs and what has to hold for any bytes whatever.

A target returns whether the input was one that decodes. Any exception but the decoder's own typed one is a finding;
libFuzzer adds limits of time and memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetrain.coordinator.audit.chain import (
    AuditError,
    Head,
    chained,
    decode_head,
    encode_head,
    genesis,
    is_sealed,
    read_lines,
    seal_signature,
)
from edgetrain.coordinator.authority.registry import AuthorityError, decode_registry
from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.blobs import HEADER_BYTES, Assembler, blob_ref, cut, parse_chunk
from edgetrain.protocol.checkpoints import SeenCheckpoint, contradiction
from edgetrain.protocol.codecs import CodecSpec, Limits, decode
from edgetrain.protocol.config import convert, parse_toml
from edgetrain.protocol.errors import (
    BlobError,
    BundleError,
    CodecError,
    ConfigError,
    MessageError,
    SecureAggregationError,
)
from edgetrain.protocol.manifest import decode_manifest, encode_manifest
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Checkpoint,
    Decline,
    Goodbye,
    Hello,
    LogPoint,
    Offer,
    Patch,
    Plan,
    Ready,
    Refusal,
    Report,
    RoundClosed,
    Secure,
    Verdict,
    Want,
    Welcome,
    decode_from_client,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.privacy import PrivacyError, Release
from edgetrain.protocol.privacy.ledger_file import (
    LedgerFile,
    decode_ledger,
    encode_ledger,
    releases_with,
    with_release,
)
from edgetrain.protocol.secure_aggregation import messages as secure
from edgetrain.protocol.signing import MAX_MESSAGE_BYTES, SigningKey, seal, unseal, verify

VECTORS = Path(__file__).parent.parent / "vectors"
KEY = SigningKey(b"fuzz".ljust(32))
RUN, DIGEST = bytes(range(16)), bytes(range(32))


@dataclass(frozen=True)
class Target:
    """One decoder."""

    seeds: Callable[[], list[bytes]]
    one: Callable[[bytes], bool]


def edited(seeds: list[bytes], edits: bytes) -> bytes:
    """Byte 0 chooses a seed; then three bytes each: a position, and what to set there or, at 0, to cut.

    That reaches what is behind headers, checksums and schemas far more often than chance does.
    """
    if not edits:
        return edits
    payload = bytearray(seeds[edits[0] % len(seeds)])
    for high, low, value in zip(edits[1::3], edits[2::3], edits[3::3], strict=False):
        position = (high << 8 | low) % (len(payload) + 1)
        if value:
            payload[position : position + 1] = bytes([value])
        else:
            del payload[position : position + 1]
    return bytes(payload)


# --- codecs ------------------------------------------------------------------------------------------

LIMITS = Limits(max_parameters=4096)


def codec_seeds() -> list[bytes]:
    """The test vectors, refused ones too."""
    payloads = [file.read_bytes() for file in sorted((VECTORS / "codecs").glob("*.payload"))]
    refused = json.loads((VECTORS / "codecs" / "cases.json").read_text())["refused"]["payloads"]
    return payloads + [bytes.fromhex(text) for text in refused.values()]


def codecs(data: bytes) -> bool:
    """A vector within the limits, of finite numbers."""
    try:
        result = decode(data, LIMITS)
    except CodecError:
        return False
    assert result.num_parameters <= LIMITS.max_parameters
    assert np.isfinite(result.dense()).all()
    return True


def codec_specs(data: bytes) -> bool:
    """A spec says itself again."""
    try:
        spec = CodecSpec.parse(data.decode(errors="replace"))
    except CodecError:
        return False
    assert CodecSpec.parse(str(spec)) == spec
    return True


# --- messages ----------------------------------------------------------------------------------------

REF = BlobRef(digest=DIGEST, size=9)
MESSAGES = [
    Hello(public_key=DIGEST, connection=RUN, edgetrain="0", runtimes=("onnxruntime",), stages=("topk", "int8")),
    Ready(bundle=DIGEST, runtime="onnxruntime", num_examples=5, connection=RUN),
    Decline(round=1, nonce=RUN, reason="no"),
    Offer(run=RUN, round=1, nonce=RUN, update=REF, num_examples=3, steps=2, metrics={"loss": 1.5}),
    Report(run=RUN, round=1, nonce=RUN, num_examples=3, metrics={"loss": 1.5}),
    Goodbye(reason="bye", connection=RUN),
    Want(digest=DIGEST, ranges=((0, 5), (7, 9))),
    Announce(run=RUN, public_key=DIGEST, edgetrain="0", bundle=REF, serial=7),
    Welcome(run=RUN),
    Refusal(reason="no", connection=RUN),
    Plan(run=RUN, round=1, nonce=RUN, bundle=DIGEST, vector=DIGEST, parameters=REF,
         patches=(Patch(base=DIGEST, blob=REF),), deadline_seconds=5.0, personal=("head.*",)),
    Verdict(round=1, digest=DIGEST, accepted=True),
    RoundClosed(run=RUN, round=1, nonce=RUN),
    Secure(run=RUN, round=1, nonce=RUN, body=b"body"),
    Checkpoint(run=RUN, newest=LogPoint(records=5, head=DIGEST), earlier=(LogPoint(records=3, head=DIGEST),)),
]  # fmt: skip


def message_seeds() -> list[bytes]:
    """A body of each type."""
    return [encode_message(message) for message in MESSAGES]


def messages(data: bytes) -> bool:
    """A message of the schema, which comes again from its own bytes."""
    good = False
    for decoder in (decode_from_client, decode_from_coordinator):
        try:
            message = decoder(data)
        except MessageError:
            continue
        if "nan" not in repr(message):
            assert decoder(encode_message(message)) == message
        good = True
    return good


SECURE_SETTINGS = secure.Settings(minimum=2, count=16, seed=1, quantizer=secure.Quantizer(range=1.0))
SECURE = [
    secure.Advertise(cipher_key=DIGEST, mask_key=DIGEST, signature=DIGEST * 2),
    secure.Shares(roster=DIGEST, commitment=DIGEST, boxes=b"x" * 40),
    secure.Agreement(signature=DIGEST * 2),
    secure.Reveal(shares=b"s" * 40),
    secure.RosterReady(digest=DIGEST, size=5),
    secure.Boxes(present=b"\x07", boxes=b"x" * 40),
    secure.Survivors(survivors=b"\x07"),
    secure.Agreements(signatures=(b"", DIGEST * 2)),
    SECURE_SETTINGS,
    secure.Roster(
        neighbours=2,
        threshold=2,
        peers=tuple(
            secure.Peer(name, *(bytes([number, kind]) * 16 for kind in range(3)), DIGEST * 2)
            for number, name in enumerate("abc")
        ),
    ),
]


def secure_aggregation(data: bytes) -> bool:
    """A message of the schema; a roster that makes sense, or the typed error."""
    good = False
    for decoder in (
        secure.decode_from_member,
        secure.decode_from_server,
        secure.decode_settings,
        lambda body: secure.open_roster.__wrapped__(body, RUN, secure.encode(SECURE_SETTINGS)),
    ):
        try:
            decoder(data)
        except SecureAggregationError:
            continue
        good = True
    return good


def envelope_seeds() -> list[bytes]:
    """Signed envelopes."""
    return [seal(KEY, "f", "pi", encode_message(message)) for message in MESSAGES]


def envelopes(data: bytes) -> bool:
    """What unseals is an envelope; only the seeds bear a good signature."""
    try:
        envelope = unseal(data)
        assert len(data) <= MAX_MESSAGE_BYTES
        verify(envelope, "f", KEY.public_key)
    except MessageError:
        return False
    assert envelope.body in BODIES, "a forged signature"
    return True


BODIES = set(message_seeds())


def topics(data: bytes) -> bool:
    """A sender's topic gives its name, which is one."""
    topic = "edgetrain/f/from/" + data.decode(errors="replace")
    found = Topics("f").sender(topic)
    if found is None:
        return False
    assert Topics("f").from_client(*found) in {topic, f"{topic}/"}
    return True


# --- manifest ----------------------------------------------------------------------------------------


def manifest_seeds() -> list[bytes]:
    """A small bundle's."""
    return [(VECTORS / "manifest.json").read_bytes()]


def manifests(data: bytes) -> bool:
    """A manifest that comes again from its own bytes."""
    try:
        manifest = decode_manifest(data)
    except BundleError:
        return False
    assert decode_manifest(encode_manifest(manifest)) == manifest
    return True


# --- chunks ------------------------------------------------------------------------------------------

BLOB = bytes(range(200))


def chunk_seeds() -> list[bytes]:
    """Chunks of a small blob, one after the other, each after its length."""
    return [
        b"".join(len(chunk).to_bytes(2, "little") + chunk for chunk in cut(blob_ref(BLOB), BLOB, chunk_bytes=size))
        for size in (50, 200, 77)
    ]


def chunks(data: bytes) -> bool:
    """Any sequence of chunks gives the blob or an error, within the blob's size."""
    assembler = Assembler(blob_ref(BLOB), limit=len(BLOB))
    position = 0
    while position + 2 <= len(data):
        length = int.from_bytes(data[position : position + 2], "little")
        payload = data[position + 2 : position + 2 + length]
        position += 2 + length
        try:
            chunk = parse_chunk(payload)
            assert len(chunk.data) == len(payload) - HEADER_BYTES
            complete = assembler.add(chunk)
        except BlobError:
            continue
        missing = assembler.missing()
        assert complete == (not missing)
        assert all(0 <= start < stop <= len(BLOB) for start, stop in missing)
    try:
        assert assembler.finish() == BLOB
    except BlobError:
        return False
    return True


# --- device file -------------------------------------------------------------------------------------


def device_seeds() -> list[bytes]:
    """A device file, shortened."""
    return [
        DEVICE.encode(),
        b'name = "a"\nfederation = "f"\ndata = "d"\nvalidation_fraction = 0.5\nexit_when_done = true\n',
    ]


DEVICE = """\
name = "a"
federation = "f"
data = "d.npz"
coordinator_key = "00"
signing_key = "11"
[broker]
host = "h"
port = 8883
username = "a"
password = "p"
tls_ca = \"\"\"
-----BEGIN CERTIFICATE-----
\"\"\"
"""


def device_files(data: bytes) -> bool:
    """Settings, or an error that names the file."""
    try:
        convert(parse_toml(data, where="device.toml"), ClientConfig, where="device.toml")
    except ConfigError as error:
        assert "device.toml" in str(error)
        return False
    return True


def registry_seeds() -> list[bytes]:
    """Two enrolments."""
    entry = {"name": "pi", "public_key": "00" * 32, "serial": "1f", "enrolled_at": "2026-01-01T00:00:00Z"}
    return [json.dumps([entry, entry | {"name": "q", "revoked_at": "x", "earlier_serials": ["2"]}]).encode()]


def registries(data: bytes) -> bool:
    """Entries whose names and keys can be used as such."""
    try:
        entries = decode_registry(data, where="enrolled.json")
    except AuthorityError:
        return False
    assert all(len(bytes.fromhex(entry.public_key)) == 32 and int(entry.serial, 16) >= 0 for entry in entries)
    assert all("/" not in entry.name and ":" not in entry.name for entry in entries)
    return True


# --- privacy ledger ----------------------------------------------------------------------------------


def ledger_seeds() -> list[bytes]:
    """Two sums and who was in them, and a file from before there were checksums."""
    release = Release(noise_multiplier=1.5, sampling="poisson", sampling_rate=0.25)
    file = LedgerFile(owner="federation f", epsilon=4.0, delta=1e-6)
    whole = encode_ledger(with_release(with_release(file, release, ["a", "b"]), release, ["b"]))
    old = {"format_version": 1, "owner": "f", "epsilon": None, "delta": 0.5, "releases": [{"noise_multiplier": 2}]}
    return [whole, json.dumps(old).encode()]


def ledgers(data: bytes) -> bool:
    """What is read says the same when it is written; and whatever it holds can be counted."""
    try:
        found = decode_ledger(data, where="ledger")
    except PrivacyError as error:
        assert "ledger" in str(error)
        return False
    again = decode_ledger(encode_ledger(found), where="ledger")
    assert (again.owner, again.limit, again.releases) == (found.owner, found.limit, found.releases)
    assert all(release.steps >= 1 for name in found.participants for release in releases_with(found, name))
    return True


# --- audit log ---------------------------------------------------------------------------------------


def audit_seeds() -> list[bytes]:
    """A log of three lines, and its head."""
    head, lines = Head(0, genesis(RUN)), []
    for fields in ({"type": "opened", "run": RUN.hex()}, {"type": "command", "command": "stop"}):
        body = json.dumps({"n": head.records, "at": "x"} | fields, separators=(",", ":")).encode()
        line, digest = chained(head.hash, body)
        lines.append(line)
        head = Head(head.records + 1, digest)
    seal_line = {"n": head.records, "type": "seal", "signature": seal_signature(KEY, RUN, head)}
    line, digest = chained(head.hash, json.dumps(seal_line, separators=(",", ":")).encode())
    lines.append(line)
    return [b"".join(lines), encode_head(KEY, RUN, Head(head.records + 1, digest))]


AUDIT = audit_seeds()


def audit_logs(data: bytes) -> bool:
    """Only the log that was sealed has a seal; only the head that was signed is one."""
    try:
        decode_head(data, RUN, KEY.public_key)
    except AuditError:
        pass
    else:
        assert data == AUDIT[1], "a forged head"
        return True
    previous, sealed = genesis(RUN), False
    try:
        for line in read_lines(io.BytesIO(data), RUN):
            sealed = line.type == "seal" and is_sealed(line, previous, RUN, KEY.public_key)
            previous = line.hash
    except AuditError:
        return False
    assert not sealed or data == AUDIT[0], "a forged log"
    return sealed


def checkpoint_seeds() -> list[bytes]:
    """Pairs of numbers: what was seen, what is told."""
    return [bytes([3, 5, 7, 0, 3, 5, 9]), bytes([1, 2, 0, 2, 4])]


def checkpoints(data: bytes) -> bool:
    """Never raises; a told history that contains what was seen, in order, is no contradiction."""
    seen_numbers, _, told_numbers = data[:64].partition(b"\0")
    if not told_numbers:
        return False
    told = [LogPoint(records=number, head=bytes([number]) * 32) for number in told_numbers]
    message = Checkpoint(run=RUN, newest=told[-1], earlier=tuple(told[:-1]), serial=5)
    seen = [
        SeenCheckpoint(run=RUN.hex(), records=number, head=(bytes([number]) * 32).hex(), serial=1)
        for number in seen_numbers
    ]
    reason = contradiction(seen, message)
    ascending = list(told_numbers) == sorted(set(told_numbers))
    honest = ascending and all(number in told_numbers or number < told_numbers[0] for number in seen_numbers)
    assert not honest or reason is None, reason
    assert not ascending or honest or reason is not None
    return reason is None


TARGETS = {
    "codecs": Target(codec_seeds, codecs),
    "codec-specs": Target(
        lambda: [b"topk:0.05|int8:block=256|rice", b"dense|float32", b"randomk:0.1|sign|zstd"], codec_specs
    ),
    "messages": Target(message_seeds, messages),
    "secure-aggregation": Target(lambda: [secure.encode(message) for message in SECURE], secure_aggregation),
    "envelopes": Target(envelope_seeds, envelopes),
    "topics": Target(lambda: [b"pi/message", b"pi/blob", b"a/b/c"], topics),
    "manifest": Target(manifest_seeds, manifests),
    "chunks": Target(chunk_seeds, chunks),
    "device-file": Target(device_seeds, device_files),
    "registry": Target(registry_seeds, registries),
    "privacy-ledger": Target(ledger_seeds, ledgers),
    "audit-log": Target(audit_seeds, audit_logs),
    "checkpoints": Target(checkpoint_seeds, checkpoints),
}

"""The messages: msgpack maps with a "type" tag, inside a signed envelope.

Unknown fields are ignored, so a minor version may add some; an unknown type is a `MessageError`.

A client's life:          Hello -> Welcome | Refusal, (fetch the bundle), Ready, then rounds, Goodbye.
A round for one client:   Plan -> (fetch the parameters, train), Offer + chunks -> Verdict
                          or Plan -> Decline; or Plan(task="evaluate") -> Report.
Secure aggregation:       Plan -> (train), Secure … Secure, Offer + chunks, Secure … Secure -> Verdict
Blobs:                    whoever lacks bytes sends Want; the other side answers with chunks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edgetrain.protocol.errors import MessageError
from edgetrain.protocol.training import TrainingConfig

BytesLike = TypeVar("BytesLike", bytes, memoryview)

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=1000)]
ShortText = Annotated[str, Meta(max_length=100)]
Numbers = Annotated[dict[ShortText, float], Meta(max_length=64)]
Range = tuple[Count, Count]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages."""


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    """A blob by its SHA-256, with its size in bytes."""

    digest: Digest
    size: Count


class Want(Message, frozen=True, kw_only=True, tag="want"):
    """Please send these bytes of a blob; sent by either side."""

    digest: Digest
    # Half-open byte ranges; empty for all of it.
    ranges: Annotated[tuple[Range, ...], Meta(max_length=1024)] = ()
    # Most payload bytes in one chunk, as suits the receiver's link; 0: as the sender likes.
    chunk_bytes: Count = 0


class Secure(Message, frozen=True, kw_only=True, tag="secure"):
    """A step of secure aggregation, see `secure_aggregation.messages`; sent by either side."""

    run: Nonce
    round: Count
    nonce: Nonce
    body: Annotated[bytes, Meta(max_length=63 << 10)]


# --- client -> coordinator ---------------------------------------------------------------------------


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator may know of a device."""

    system: ShortText = ""
    machine: ShortText = ""
    cpus: Count = 0
    memory_mb: Count = 0


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """How a device is now; None and "" for what it does not know."""

    battery_percent: float | None = None
    charging: bool | None = None
    # "wifi", "ethernet", "cellular", …
    network: ShortText = ""
    free_memory_mb: Count | None = None
    # Of the hottest sensor.
    temperature_c: float | None = None


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First message of every connection."""

    public_key: Key
    # Random per connection; a Goodbye of another connection does not count.
    connection: Nonce
    # Version of edgetrain, for people.
    edgetrain: ShortText
    runtimes: Annotated[tuple[ShortText, ...], Meta(max_length=32)]
    # Codec stages that the client can encode and decode.
    stages: Annotated[tuple[ShortText, ...], Meta(max_length=64)]
    device: DeviceInfo = DeviceInfo()


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """The client has this bundle, its self-test passed, and it can take part."""

    bundle: Digest
    runtime: ShortText
    num_examples: Count
    state: DeviceState = DeviceState()
    # As in the Hello before: a copy from an earlier connection does not count. None: an older edgetrain.
    connection: Nonce | None = None


class Decline(Message, frozen=True, kw_only=True, tag="decline"):
    """The client will not do this plan."""

    round: Count
    nonce: Nonce
    reason: Text


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What the client has spent since it started; counters only grow."""

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    bytes_sent: Count = 0
    bytes_received: Count = 0


class Offer(Message, frozen=True, kw_only=True, tag="offer"):
    """An update is ready; its chunks follow. Sent again when in doubt: a duplicate is a no-op."""

    run: Nonce
    round: Count
    nonce: Nonce
    update: BlobRef
    num_examples: Count
    # Optimizer steps done.
    steps: Count
    # The last so many bytes of `update` are the change of the client's control variate, encoded like the
    # update before it; 0 where the plan has no `control`.
    control_bytes: Count = 0
    # Whether the update was within `training.max_delta_norm` before it was clipped; nil where the plan has none.
    unclipped: bool | None = None
    # Means over the local training: "loss", "accuracy", …
    metrics: Numbers = {}
    resources: Resources = Resources()
    state: DeviceState = DeviceState()


class Report(Message, frozen=True, kw_only=True, tag="report"):
    """Result of an evaluation plan."""

    run: Nonce
    round: Count
    nonce: Nonce
    num_examples: Count
    metrics: Numbers = {}
    resources: Resources = Resources()


class Goodbye(Message, frozen=True, kw_only=True, tag="goodbye"):
    """The client leaves, or (as its last will) its connection was lost."""

    reason: Text
    connection: Nonce


# --- coordinator -> clients --------------------------------------------------------------------------


class Announce(Message, frozen=True, kw_only=True, tag="announce"):
    """Retained: what runs here."""

    run: Nonce
    public_key: Key
    edgetrain: ShortText
    # The manifest of the bundle; its digest names the bundle.
    bundle: BlobRef
    # open: clients may join. paused: wait. ended: go home.
    status: Literal["open", "paused", "ended"] = "open"
    reason: Text = ""
    # Grows with every announcement of a run, so that an old one cannot be replayed.
    serial: Count = 0


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Answer to Hello."""

    run: Nonce


class Refusal(Message, frozen=True, kw_only=True, tag="refusal"):
    """The coordinator will not have this client: give up."""

    reason: Text
    # Of the Hello that is refused, so that nobody can have a client refused by taking its name. None: to
    # whoever speaks another version of the protocol.
    connection: Nonce | None = None


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """What turns one round's parameters into a later round's: a delta, encoded by a codec."""

    # SHA-256 of the vector that it is added to, as little-endian float32.
    base: Digest
    blob: BlobRef


class Plan(Message, frozen=True, kw_only=True, tag="plan"):
    """What a client is asked to do in a round."""

    run: Nonce
    round: Count
    # Random per round: an update made for another plan does not fit.
    nonce: Nonce
    task: Literal["train", "evaluate"] = "train"
    bundle: Digest
    # SHA-256 of the round's parameters, as little-endian float32.
    vector: Digest
    # They, whole, encoded by a codec.
    parameters: BlobRef
    # Or for those who have older ones: patches, oldest first, each one's result the base of the next.
    patches: Annotated[tuple[Patch, ...], Meta(max_length=64)] = ()
    training: TrainingConfig = TrainingConfig()
    # The coordinator's control variate (SCAFFOLD), encoded by a codec: the client keeps one of its own, and
    # sends its change along.
    control: BlobRef | None = None
    # Names of parameters that stay on the device, as file name patterns.
    personal: Annotated[tuple[ShortText, ...], Meta(max_length=64)] = ()
    # How the updates are aggregated securely: `secure_aggregation.messages.Settings`, encoded. Empty: not at all.
    secure: Annotated[bytes, Meta(max_length=4096)] = b""
    # Codec of the update.
    codec: ShortText = "dense|float32"
    # Seconds from now until the round closes.
    deadline_seconds: float
    # Base seed; the client mixes in its own name.
    seed: Count = 0


class Verdict(Message, frozen=True, kw_only=True, tag="verdict"):
    """What became of an update. Accepted means: on the coordinator's disk."""

    round: Count
    digest: Digest
    accepted: bool
    reason: Text = ""
    # The client will not be needed before so many seconds have passed: it may leave and come back; 0: stay.
    come_back_seconds: Annotated[float, Meta(ge=0)] = 0.0


class RoundClosed(Message, frozen=True, kw_only=True, tag="closed"):
    """Whoever still trains for this round may stop."""

    run: Nonce
    round: Count
    nonce: Nonce


class LogPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A state of the coordinator's audit log."""

    # Its lines so far.
    records: Count
    # The chain hash of the last of them.
    head: Digest


class Checkpoint(Message, frozen=True, kw_only=True, tag="checkpoint"):
    """Retained: how far the run's audit log has come, for clients to remember and compare."""

    run: Nonce
    newest: LogPoint
    # All checkpoints before it, or the last 63 of them, oldest first.
    earlier: Annotated[tuple[LogPoint, ...], Meta(max_length=64)] = ()
    # Grows, as that of Announce.
    serial: Count = 0


FromClient = Hello | Ready | Decline | Offer | Report | Goodbye | Want | Secure
FromCoordinator = Announce | Welcome | Refusal | Plan | Verdict | RoundClosed | Checkpoint | Want | Secure

_encode = msgspec.msgpack.Encoder().encode
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator)


def split_update(offer: Offer, update: BytesLike) -> tuple[BytesLike, BytesLike]:
    """(the encoded delta, the encoded change of the control variate or nothing) of an update."""
    end = len(update) - offer.control_bytes
    return update[:end], update[end:]


def encode_message(message: Message) -> bytes:
    """The body of an envelope."""
    return _encode(message)


def decode_from_client(body: bytes) -> FromClient:
    """A message from a client.

    Raises:
        MessageError: of no known type, or a field that breaks the schema.
    """
    message: FromClient = _decode(_from_client, body)
    return message


def decode_from_coordinator(body: bytes) -> FromCoordinator:
    """A message from the coordinator.

    Raises:
        MessageError: of no known type, or a field that breaks the schema.
    """
    message: FromCoordinator = _decode(_from_coordinator, body)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"message breaks the schema: {error}") from error

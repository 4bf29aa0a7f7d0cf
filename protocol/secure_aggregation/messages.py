"""What clients and the coordinator tell each other in a session of secure aggregation.

Each is the msgpack body of a `Secure` message, which names run, round and nonce. In order:

    client       Advertise     my keys for this session, signed
    coordinator  RosterReady   everybody's, as a blob that holds a Roster
    client       Shares        shares of my secrets, sealed for my neighbours
    coordinator  Boxes         who sent shares, and what your neighbours sealed for you
    client       (an Offer)    my masked vector
    coordinator  Survivors     whose vectors arrived
    client       Agreement     I was told of these survivors, signed
    coordinator  Agreements    what your neighbours signed
    client       Reveal        one share of each neighbour: of its seed if it survived, else of its mask key

Clients are named by their positions in the roster, and in that order where there is something of each of several;
sets of them are bitmaps, the lowest bit first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edgetrain.protocol.enrolment import PROOF_BYTES
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation.arithmetic import Layout, Quantizer, make_layout
from edgetrain.protocol.secure_aggregation.graph import Graph, make_graph
from edgetrain.protocol.secure_aggregation.keys import TAG_BYTES
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES
from edgetrain.protocol.training import TrainingConfig

# Boxes must fit into one message of 64 KiB.
MAX_NEIGHBOURS = 600
MAX_CLIENTS = 20_000
BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Key = Digest
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Bits = Annotated[bytes, Meta(min_length=1, max_length=-(-MAX_CLIENTS // 8))]
Name = Annotated[str, Meta(max_length=64)]
# Nothing, or what `enrolment.prove_enrolment` makes.
Proof = Annotated[bytes, Meta(max_length=PROOF_BYTES)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan of a round says of secure aggregation; all who take part must have the same."""

    # Fewest clients in the sum.
    minimum: Annotated[int, Meta(ge=2, le=MAX_CLIENTS)]
    # Values that are summed, of all parameters: those at `support`.
    count: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    # Stands for the support, see `support`.
    seed: Annotated[int, Meta(ge=0, lt=2**53)]
    # SHA-256 and size of a blob with further positions; no digest for none.
    positions: Annotated[bytes, Meta(max_length=32)] = b""
    positions_bytes: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    quantizer: Quantizer
    # Largest share of the clients that may collude with the coordinator, and whether that may lie.
    colluding: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    lying: bool = True
    # A client scales its values down to this L2 norm before they are quantized; 0 for no limit.
    max_norm: Annotated[float, Meta(ge=0)] = 0.0
    # Deviation of the noise of all clients together, in `max_norm`; 0 for none. Then the norm holds after rounding.
    noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    noise: Literal["discrete-gaussian", "skellam"] = "discrete-gaussian"
    # Fewest honest clients that a sum may come from: so many shares make up the noise.
    noise_shares: Annotated[int, Meta(ge=1, le=MAX_CLIENTS)] = 1


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A client in the roster."""

    name: Name
    # Ed25519; signs the keys.
    identity: Key
    # X25519; for boxes, and for masks.
    cipher_key: Key
    mask_key: Key
    signature: Signature
    # That the federation's CA has enrolled this name with this identity.
    enrolment: Proof = b""


class Roster(msgspec.Struct, frozen=True, kw_only=True):
    """Who is in the session, in the order of their names."""

    # Of each; and how many holders of shares it takes to get a secret back.
    neighbours: Annotated[int, Meta(ge=1, le=MAX_NEIGHBOURS)]
    threshold: Annotated[int, Meta(ge=1, le=MAX_NEIGHBOURS + 1)]
    peers: Annotated[tuple[Peer, ...], Meta(max_length=MAX_CLIENTS)]


class _Tagged(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Advertise(_Tagged, frozen=True, kw_only=True, tag="advertise"):
    """A client's keys for this session."""

    cipher_key: Key
    mask_key: Key
    # Over `keys_statement`.
    signature: Signature
    enrolment: Proof = b""


class Shares(_Tagged, frozen=True, kw_only=True, tag="shares"):
    """Sealed for each neighbour, one after the other: a share of the mask key and one of the seed."""

    # Of the roster that it was told.
    roster: Digest
    # To the seed, see `keys.commitment`.
    commitment: Digest
    boxes: Annotated[bytes, Meta(max_length=BOX_BYTES * MAX_NEIGHBOURS)]


class Agreement(_Tagged, frozen=True, kw_only=True, tag="agreement"):
    """Over `survivors_statement`."""

    signature: Signature


class Reveal(_Tagged, frozen=True, kw_only=True, tag="reveal"):
    """A share for each holder that is present, one after the other; zeros where its box could not be opened."""

    shares: Annotated[bytes, Meta(max_length=SHARE_BYTES * (MAX_NEIGHBOURS + 1))]


class RosterReady(_Tagged, frozen=True, kw_only=True, tag="roster"):
    """Fetch it."""

    digest: Digest
    size: Annotated[int, Meta(ge=1, lt=2**32)]


class Boxes(_Tagged, frozen=True, kw_only=True, tag="boxes"):
    """Mask your vector against these."""

    # Those whose shares were received.
    present: Bits
    # From each neighbour that is present, one after the other.
    boxes: Annotated[bytes, Meta(max_length=BOX_BYTES * MAX_NEIGHBOURS)]


class Survivors(_Tagged, frozen=True, kw_only=True, tag="survivors"):
    """Whose vectors are in the sum."""

    survivors: Bits


class Agreements(_Tagged, frozen=True, kw_only=True, tag="agreements"):
    """What each neighbour signed, ascending; nothing for those that are silent."""

    signatures: Annotated[tuple[Annotated[bytes, Meta(max_length=64)], ...], Meta(max_length=MAX_NEIGHBOURS)]


FromMember = Advertise | Shares | Agreement | Reveal
FromServer = RosterReady | Boxes | Survivors | Agreements

_from_member = msgspec.msgpack.Decoder(FromMember)
_from_server = msgspec.msgpack.Decoder(FromServer)
_roster = msgspec.msgpack.Decoder(Roster)
_settings = msgspec.msgpack.Decoder(Settings)


def encode(message: FromMember | FromServer | Roster | Settings) -> bytes:
    """As it is sent."""
    return msgspec.msgpack.encode(message)


def decode_from_member(body: bytes) -> FromMember:
    """A client's message.

    Raises:
        SecureAggregationError: it is none.
    """
    message: FromMember = _decode(_from_member, body)
    return message


def decode_from_server(body: bytes) -> FromServer:
    """The coordinator's message.

    Raises:
        SecureAggregationError: it is none.
    """
    message: FromServer = _decode(_from_server, body)
    return message


def decode_settings(body: bytes) -> Settings:
    """The settings of a plan.

    Raises:
        SecureAggregationError: they are none.
    """
    settings: Settings = _decode(_settings, body)
    return settings


def pieces(data: bytes, size: int, count: int) -> list[bytes]:
    """What stands one after the other, each of `size` bytes.

    Raises:
        SecureAggregationError: not `count` of them.
    """
    if len(data) != size * count:
        raise SecureAggregationError(f"{len(data)} bytes where {count} times {size} were expected")
    return [data[start : start + size] for start in range(0, len(data), size)]


def work_digest(*, bundle: bytes, vector: bytes, training: TrainingConfig, personal: tuple[str, ...]) -> bytes:
    """What all of a session have trained, and how.

    If a coordinator could give one client other parameters, or another learning rate, than all others, it could see
    to it that the others' updates are zero, and the sum is that one's (Pasquini, Francati and Ateniese, "Eluding
    Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022). How long a client trains may depend
    on its device: it is always at least a step.

    Args:
        bundle: its digest.
        vector: digest of the parameters.
        training: as in the plan.
        personal: likewise.
    """
    alike = msgspec.structs.replace(training, epochs=1, batch_size=1, max_steps=0)
    # As it is after a journey: a whole number in place of a float is none any more.
    alike = msgspec.msgpack.decode(msgspec.msgpack.encode(alike), type=TrainingConfig)
    how = msgspec.msgpack.encode((alike, personal))
    return hashlib.sha256(b"edgetrain secure aggregation work 1\0" + bundle + vector + how).digest()


def session_digest(
    *, federation: str, run: bytes, round_number: int, nonce: bytes, work: bytes, settings: bytes
) -> bytes:
    """What every key, signature and box of a session is bound to; `work` is a `work_digest`."""
    parts = (federation.encode(), run, str(round_number).encode(), nonce, work, settings)
    prefixed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return hashlib.sha256(b"edgetrain secure aggregation session 1\0" + prefixed).digest()


def keys_statement(session: bytes, name: str, cipher_key: bytes, mask_key: bytes) -> bytes:
    """What a client signs of its keys."""
    return b"edgetrain secure aggregation keys 1\0" + session + cipher_key + mask_key + name.encode()


def survivors_statement(roster: bytes, survivors: bytes) -> bytes:
    """What a client signs of the survivors it was told of; once in a session."""
    return b"edgetrain secure aggregation survivors 1\0" + roster + survivors


class Cast(msgspec.Struct, frozen=True):
    """A roster with what follows from it."""

    digest: bytes
    roster: Roster
    graph: Graph
    layout: Layout
    positions: dict[str, int]

    def bits(self, clients: Iterable[int]) -> bytes:
        """The bitmap of a set."""
        marks = np.zeros(len(self.roster.peers), np.uint8)
        marks[list(clients)] = 1
        return np.packbits(marks, bitorder="little").tobytes()

    def members(self, bits: bytes) -> frozenset[int]:
        """The set of a bitmap.

        Raises:
            SecureAggregationError: a bitmap of another length, or with bits behind its end.
        """
        marks = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        size = len(self.roster.peers)
        if len(bits) != -(-size // 8) or marks[size:].any():
            raise SecureAggregationError(f"a bitmap of another length than {size} clients need")
        return frozenset(np.flatnonzero(marks).tolist())


@lru_cache(maxsize=4)
def open_roster(data: bytes, session: bytes, settings: bytes) -> Cast:
    """A roster as it is sent, checked for what makes no sense. Signatures are for its readers to check.

    Raises:
        SecureAggregationError: not a roster, or one that no honest coordinator makes.
    """
    roster: Roster = _decode(_roster, data)
    peers, agreed = roster.peers, decode_settings(settings)
    names = [peer.name for peer in peers]
    if names != sorted(set(names)):
        raise SecureAggregationError("the roster is not in the order of its names, each once")
    keys = [key for peer in peers for key in (peer.identity, peer.cipher_key, peer.mask_key)]
    if len(set(keys)) != len(keys):
        raise SecureAggregationError("two clients of the roster have equal keys")
    if len(peers) < agreed.minimum:
        raise SecureAggregationError(f"the roster has {len(peers)} clients, the plan asks for {agreed.minimum}")
    digest = hashlib.sha256(b"edgetrain secure aggregation roster 1\0" + session + data).digest()
    graph = make_graph(len(peers), roster.neighbours, digest)
    if not roster.neighbours + 1 < 2 * roster.threshold <= 2 * (roster.neighbours + 1):
        raise SecureAggregationError(
            f"a threshold of {roster.threshold} among {roster.neighbours + 1} holders of shares: it is not a majority"
        )
    layout = make_layout(agreed.quantizer, count=agreed.count, clients=len(peers))
    return Cast(digest, roster, graph, layout, {name: position for position, name in enumerate(names)})


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SecureAggregationError(f"a message of secure aggregation breaks the schema: {error}") from error

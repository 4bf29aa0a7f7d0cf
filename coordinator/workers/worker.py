"""One aggregation worker: holds what arrives, folds and journals what the coordinator says.

It knows nothing of rounds, rosters and signatures: which update counts is the coordinator's to say, and it says so of
each only once. What this worker has folded is in its own segment of the journal, on the disk before it is reported.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.rounds.contributions import offer_in
from edgetrain.coordinator.rounds.invitations import checked_strategy
from edgetrain.coordinator.strategies import Mergeable
from edgetrain.coordinator.workers.messages import (
    CloseRound,
    Command,
    Drop,
    Held,
    Malformed,
    OpenRound,
    Refused,
    Report,
    Share,
    Spool,
    Spooled,
    Take,
    Taken,
)
from edgetrain.protocol import BlobError
from edgetrain.protocol.blobs import MAX_CHUNK_BYTES, Chunk, parse_chunk
from edgetrain.protocol.codecs import Limits
from edgetrain.protocol.messages import BlobRef
from edgetrain.protocol.names import Topics
from edgetrain.protocol.partial import read_whole, store_piece
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport import Received

# Bytes that are held until the coordinator has said what to do with them; the oldest go first. Whoever sent them is
# asked again.
HELD_BYTES = 64 << 20


class Worker:
    """A worker's state. Used by one thread.

    Args:
        config: of the federation.
        report: gets reports, some at a time.
    """

    def __init__(self, config: FederationConfig, report: Callable[[Sequence[Report]], None]) -> None:
        self._strategy = checked_strategy(config)
        self._max_examples = config.limits.max_examples
        self._topics = Topics(config.federation)
        self._report = report
        # Pieces by client and blob, the oldest first.
        self._pieces: OrderedDict[tuple[str, bytes], list[Chunk]] = OrderedDict()
        self._held = 0
        self._round = 0
        self._collection: Collection | None = None
        self._reports: list[Report] = []
        # Of updates that are not synced yet.
        self._receipts: list[Taken] = []

    def on_message(self, message: Received) -> None:
        """A message from the shared subscription."""
        sender = self._topics.sender(message.topic)
        if sender is None or sender[1] != "blob":
            return
        client, payload = sender[0], message.payload
        try:
            if len(payload) > MAX_CHUNK_BYTES:
                raise BlobError(f"a chunk of {len(payload)} bytes exceeds the limit of {MAX_CHUNK_BYTES}")
            chunk = parse_chunk(payload)
        except BlobError as error:
            self._reports.append(Malformed(client, len(payload), str(error)))
            return
        self._pieces.setdefault((client, chunk.digest), []).append(chunk)
        self._held += len(chunk.data)
        while self._held > HELD_BYTES:
            self._drop(*next(iter(self._pieces)))
        stop = chunk.offset + len(chunk.data)
        self._reports.append(Held(client, chunk.digest, chunk.size, chunk.offset, stop, chunk.is_whole))

    def on_command(self, command: Command) -> None:
        """What the coordinator says.

        Raises:
            RunError: the disk does not take it.
        """
        match command:
            case OpenRound():
                self._open(command)
            case Take():
                self._take(command)
            case Spool():
                self._spool(command)
            case Drop():
                self._drop(command.client, command.digest)
            case CloseRound():
                self._close(command.round)

    def flush(self) -> None:
        """Syncs what was folded, then reports everything since the last time.

        Raises:
            RunError: the disk did not take it; then nothing of it is reported.
        """
        if self._receipts:
            assert self._collection, "something was folded"
            self._collection.commit()
            self._reports += self._receipts
            self._receipts.clear()
        if self._reports:
            reports, self._reports = self._reports, []
            self._report(reports)

    def close(self) -> None:
        """Closes the journal."""
        if self._collection:
            self._collection.close()
            self._collection = None

    # --- rounds --------------------------------------------------------------------------------------

    def _open(self, command: OpenRound) -> None:
        self.close()
        limits = Limits(max_parameters=command.num_parameters, max_bytes=command.max_update_bytes)
        collection = Collection(
            self._strategy, command.num_parameters, command.server_state, limits, self._max_examples
        )
        partial = collection.partial
        assert isinstance(partial, Mergeable), "checked before any worker was started"
        partial.share(command.shares)
        collection.open_segment(command.segment, command.opened)
        self._collection, self._round = collection, command.opened.round

    def _close(self, number: int) -> None:
        self.flush()
        collection = self._collection
        if collection is None or number != self._round:
            return
        self._reports.append(Share(number, collection.partial, tuple(collection.digests)))
        self.close()
        self._pieces.clear()
        self._held = 0

    # --- updates -------------------------------------------------------------------------------------

    def _take(self, command: Take) -> None:
        client, offer = command.client, offer_in(command.envelope)
        assert self._collection, "a round was opened before"
        try:
            update = self._whole(command, offer.update)
            if update is None:
                self._reports.append(Refused(client, "it is not here any more", missing=True))
                return
            self._collection.accept(client, offer, command.envelope, update, _training(command.training))
        except (UpdateRefused, BlobError) as error:
            self._reports.append(Refused(client, str(error)))
        else:
            self._receipts.append(Taken(client))
        finally:
            self._drop(client, offer.update.digest)

    def _whole(self, command: Take, ref: BlobRef) -> bytes | memoryview | None:
        """The update's bytes, verified; None if they are not here."""
        if command.spool is not None:
            try:
                return read_whole(command.spool, ref)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise RunError(f"{command.spool}: cannot read an update that has arrived: {error}") from error
        pieces = self._pieces.get((command.client, ref.digest), ())
        return next((piece.data for piece in pieces if piece.is_whole and piece.size == ref.size), None)

    def _spool(self, command: Spool) -> None:
        for piece in self._pieces.get((command.client, command.digest), ()):
            try:
                store_piece(command.directory, piece)
            except OSError as error:
                raise RunError(f"{command.directory}: cannot store an update: {error}") from error
            stop = piece.offset + len(piece.data)
            self._reports.append(Spooled(command.client, command.digest, piece.offset, stop))
        self._drop(command.client, command.digest)

    def _drop(self, client: str, digest: bytes) -> None:
        for piece in self._pieces.pop((client, digest), ()):
            self._held -= len(piece.data)


@functools.lru_cache(maxsize=256)
def _training(encoded: bytes) -> TrainingConfig:
    """Most clients are told the same."""
    return msgspec.msgpack.decode(encoded, type=TrainingConfig)

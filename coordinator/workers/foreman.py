"""The coordinator's side of its workers: says which update is whose, and asks for their shares at the end of a round.

Chunks reach whichever worker the broker chooses. It says what it holds, and is told what to do with that: take the
update, if it is whole and nobody else has it; put the pieces where the others put theirs; or drop them. So every update
is folded by one worker, which has it in its segment of the journal before it says so.

A worker that dies takes nothing with it but what was not yet acknowledged. What is whole in its segment counts; the
others' senders are asked again; a new worker takes up the segment.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgetrain.coordinator.errors import RunError, UpdateRefused
from edgetrain.coordinator.rounds.open_round import OpenRound, Upload
from edgetrain.coordinator.run.segments import segment_path
from edgetrain.coordinator.strategies import ServerState
from edgetrain.coordinator.workers import messages as say
from edgetrain.coordinator.workers.crew import Crew
from edgetrain.coordinator.workers.listener import Listener
from edgetrain.coordinator.workers.pieces import RemotePieces
from edgetrain.protocol.training import TrainingConfig

logger = logging.getLogger(__name__)

# Pieces that came ahead of their offers and wait for them; the oldest are dropped.
MAX_UNCLAIMED = 1 << 14
# So many workers died one after the other, without any work done in between: it will not get better by itself.
MAX_DEATHS = 10
# A worker that has something to do reports at every sync; this is longer than any disk takes.
SILENCE_SECONDS = 120.0


@dataclass(slots=True)
class _Round:
    """The round that the workers are at."""

    current: OpenRound
    command: Callable[[int], say.OpenRound]
    # Updates that are with a worker, by client.
    in_work: dict[str, tuple[int, Upload]] = field(default_factory=dict)
    # What came ahead of its offer: (client, digest) to (worker, what it holds).
    unclaimed: OrderedDict[tuple[str, bytes], list[tuple[int, say.Held]]] = field(default_factory=OrderedDict)
    num_unclaimed: int = 0
    closing: bool = False
    # By worker; None for one whose segment was folded here.
    shares: dict[int, say.Share | None] = field(default_factory=dict)


class Foreman:
    """Leads some workers. Used by the coordinator's thread.

    Args:
        hire: makes who runs them.
        count: how many.
        listener: hears what becomes of updates.
        journal: path of a round's journal.
        max_update_bytes: of one update.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        hire: Callable[[], Crew],
        count: int,
        *,
        listener: Listener,
        journal: Callable[[int], Path],
        max_update_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        # Those that have something to do, and since when nothing was heard of them.
        self._since: dict[int, float] = {}
        self._hire = hire
        self._crew: Crew | None = None
        self._listener = listener
        self._journal = journal
        self._max_update_bytes = max_update_bytes
        self._lives = dict.fromkeys(range(count), 0)
        self._deaths = 0
        # What is to be said to each.
        self._outbox: dict[int, list[say.Command]] = {}
        self._round: _Round | None = None

    def start(self) -> None:
        """Starts the workers.

        Raises:
            ConfigError: what runs them is not installed, or does not start.
        """
        self._crew = self._hire()
        for worker, life in self._lives.items():
            self._crew.start(worker, life)

    def flush(self) -> None:
        """Tells the workers what they are to be told."""
        outbox, self._outbox = self._outbox, {}
        for worker, commands in outbox.items():
            if self._crew:
                self._crew.send(worker, commands)

    def end_hanging(self) -> None:
        """Ends those that have something to do and say nothing: then others do it."""
        now, waited_for = self._clock(), self._waited_for()
        self._since = {worker: self._since.get(worker, now) for worker in waited_for}
        for worker, since in self._since.items():
            if self._crew and now - since > SILENCE_SECONDS:
                logger.warning("worker %d has said nothing for %.0f s: it is ended", worker, now - since)
                self._since[worker] = now
                self._crew.kill(worker)

    def _waited_for(self) -> set[int]:
        if self._round is None:
            return set()
        working = {worker for worker, _ in self._round.in_work.values()}
        return working | (self._lives.keys() - self._round.shares.keys() if self._round.closing else set())

    def _tell(self, worker: int, command: say.Command) -> None:
        self._outbox.setdefault(worker, []).append(command)

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self._lives)

    def close(self) -> None:
        """Ends the workers. Idempotent."""
        if self._crew:
            self._crew.close()
            self._crew = None

    # --- rounds --------------------------------------------------------------------------------------

    def open_round(self, current: OpenRound, num_parameters: int, server_state: ServerState) -> None:
        """Lets the workers take updates of a round; those that are in their segments have been listed."""
        collection = current.collection
        journal = self._journal(current.state.number)

        def command(worker: int) -> say.OpenRound:
            return say.OpenRound(
                opened=collection.opened,
                segment=segment_path(journal, worker),
                num_parameters=num_parameters,
                max_update_bytes=self._max_update_bytes,
                server_state=server_state,
                shares=len(self._lives),
            )

        self._round = _Round(current, command)
        for worker in self._lives:
            self._tell(worker, command(worker))
        self.flush()

    def ask_for_shares(self) -> None:
        """Ends the round: no update is taken any more."""
        assert self._round, "open_round comes first"
        self._round.closing = True
        for worker in self._lives:
            if worker not in self._round.shares:
                self._tell(worker, say.CloseRound(self._round.current.state.number))
        self.flush()

    @property
    def has_shares(self) -> bool:
        """All workers have given theirs."""
        return self._round is not None and len(self._round.shares) == len(self._lives)

    def add_shares(self) -> None:
        """Adds the workers' shares to what was folded here: every update that counts, once.

        Raises:
            RunError: they are not that.
        """
        assert self._round, "open_round comes first"
        collection = self._round.current.collection
        shares = [share for _, share in sorted(self._round.shares.items()) if share is not None]
        clients = [*collection.folded, *(client for share in shares for client in share.clients)]
        if sorted(clients) != sorted(collection.digests):
            raise RunError(
                f"round {self._round.current.state.number}: {len(clients)} updates are in the workers' shares, "
                f"{len(collection.digests)} were accepted; start the coordinator again to sum them up from the journal"
            )
        try:
            for share in shares:
                collection.partial.merge(share.partial)
        except UpdateRefused as error:
            raise RunError(f"round {self._round.current.state.number}: {error}; go on without workers") from error
        self._round = None

    # --- uploads -------------------------------------------------------------------------------------

    def on_offered(self, client: str, upload: Upload) -> None:
        """An upload was admitted; pieces of it may be here."""
        if self._round is None:
            return
        assert isinstance(upload.assembler, RemotePieces), "made for us"
        if upload.assembler.complete:
            self._take_from_spool(client, upload)
            return
        early = self._round.unclaimed.pop((client, upload.offer.update.digest), [])
        self._round.num_unclaimed -= len(early)
        for worker, held in early:
            self._on_held(worker, held)

    # --- what workers say ----------------------------------------------------------------------------

    def hear(self, said: object) -> None:
        """Handles what a worker says, or that it is gone: `Reports` and `Died`.

        Raises:
            RunError: the workers cannot go on.
        """
        if self._crew is None or not isinstance(said, say.Reports | say.Died):
            return
        if said.life != self._lives.get(said.worker):
            return
        self._since.pop(said.worker, None)
        if isinstance(said, say.Died):
            self._on_died(self._crew, said)
            return
        for report in said.reports:
            match report:
                case say.Held():
                    if self._listener.on_arrived(report.client, report.stop - report.start):
                        self._on_held(said.worker, report)
                    else:
                        self._drop(said.worker, report.client, report.digest)
                case say.Spooled():
                    self._on_spooled(report)
                case say.Taken():
                    self._on_taken(said.worker, report)
                case say.Refused():
                    self._on_refused(said.worker, report)
                case say.Malformed():
                    self._listener.on_malformed(report.client, report.num_bytes, report.reason)
                case say.Share():
                    self._on_share(said.worker, report)
                case say.Failed():
                    raise RunError(report.reason)

    def _on_held(self, worker: int, held: say.Held) -> None:
        if self._round is None or self._round.closing:
            return
        upload = self._upload(held.client, held.digest)
        if upload is None:
            self._keep(self._round, worker, held)
        elif upload.in_work or held.size != upload.offer.update.size:
            self._drop(worker, held.client, held.digest)
        elif held.whole:
            self._take(worker, held.client, upload)
        else:
            self._spool(worker, held.client, upload)

    def _keep(self, at: _Round, worker: int, held: say.Held) -> None:
        """Notes a piece whose offer is not here yet; anybody can send some, so there is a limit."""
        at.unclaimed.setdefault((held.client, held.digest), []).append((worker, held))
        at.num_unclaimed += 1
        while at.num_unclaimed > MAX_UNCLAIMED:
            (client, digest), late = at.unclaimed.popitem(last=False)
            at.num_unclaimed -= len(late)
            for holder in {holder for holder, _ in late}:
                self._drop(holder, client, digest)

    def _on_spooled(self, spooled: say.Spooled) -> None:
        upload = self._upload(spooled.client, spooled.digest)
        if upload is None or upload.in_work or self._round is None or self._round.closing:
            return
        self._deaths = 0
        assert isinstance(upload.assembler, RemotePieces), "made for us"
        upload.assembler.note(spooled.start, spooled.stop)
        if upload.assembler.complete:
            self._take_from_spool(spooled.client, upload)

    def _on_taken(self, worker: int, taken: say.Taken) -> None:
        found = self._resolved(worker, taken.client)
        if found is None or self._round is None:
            return
        self._deaths = 0
        found.assembler.discard()
        row = self._round.current.collection.note_taken(taken.client, found.offer)
        self._listener.on_counted(found.offer, row)

    def _on_refused(self, worker: int, refused: say.Refused) -> None:
        found = self._resolved(worker, refused.client)
        if found is None:
            return
        if refused.missing:
            self._listener.ask_again(refused.client, found)
        else:
            found.assembler.discard()
            self._listener.on_refused(refused.client, found.offer, refused.reason)

    def _on_share(self, worker: int, share: say.Share) -> None:
        if self._round and share.round == self._round.current.state.number:
            self._deaths = 0
            self._round.shares[worker] = share

    def _on_died(self, crew: Crew, died: say.Died) -> None:
        worker, self._lives[died.worker] = died.worker, died.life + 1
        self._outbox.pop(worker, None)
        self._deaths += 1
        logger.warning("worker %d has died (%s); another takes its place", worker, died.reason)
        if self._deaths >= MAX_DEATHS:
            raise RunError(
                f"workers die without having done anything, the last one of: {died.reason}; look at what they said "
                "before, or go on without workers"
            )
        crew.start(worker, died.life + 1)
        if self._round is None:
            return
        if not self._round.closing:
            # First of all: it may be given updates at once.
            self._tell(worker, self._round.command(worker))
        self._take_up(self._round, worker)
        if self._round.closing and worker not in self._round.shares:
            self._fold_here(self._round, worker)

    def _take_up(self, at: _Round, worker: int) -> None:
        """What a dead worker has folded counts; of the rest, nobody knows what it held."""
        collection = at.current.collection
        for offer, row in collection.list_segment(at.command(worker).segment, collection.opened):
            found = self._resolved(worker, row.client)
            if found:
                found.assembler.discard()
            self._listener.on_counted(offer, row)
        for client in [client for client, (holder, _) in at.in_work.items() if holder == worker]:
            self._resolved(worker, client)
        at.unclaimed.clear()
        at.num_unclaimed = 0
        if at.closing:
            return
        for client, upload in list(at.current.uploads.items()):
            if upload.in_work:
                continue
            if isinstance(upload.assembler, RemotePieces) and upload.assembler.complete:
                self._take_from_spool(client, upload)
            else:
                self._listener.ask_again(client, upload)

    def _fold_here(self, at: _Round, worker: int) -> None:
        """The share of a worker that died before it could give it."""
        collection = at.current.collection
        collection.fold_segment(at.command(worker).segment, collection.opened)
        at.shares[worker] = None

    # --- what they are told --------------------------------------------------------------------------

    def _take(self, worker: int, client: str, upload: Upload, spool: Path | None = None) -> None:
        assert self._round, "an upload is open"
        upload.in_work = True
        self._round.in_work[client] = (worker, upload)
        training = _encoded(self._round.current.trainings[client])
        self._tell(worker, say.Take(client, upload.envelope, training, spool))

    def _take_from_spool(self, client: str, upload: Upload) -> None:
        assert self._round, "an upload is open"
        busy = [worker for worker, _ in self._round.in_work.values()]
        idlest = min(self._lives, key=busy.count)
        assert isinstance(upload.assembler, RemotePieces), "made for us"
        self._take(idlest, client, upload, upload.assembler.directory)

    def _spool(self, worker: int, client: str, upload: Upload) -> None:
        assert isinstance(upload.assembler, RemotePieces), "made for us"
        try:
            upload.assembler.prepare()
        except OSError as error:
            raise RunError(f"{upload.assembler.directory}: cannot be used: {error}") from error
        self._tell(worker, say.Spool(client, upload.offer.update.digest, upload.assembler.directory))

    def _drop(self, worker: int, client: str, digest: bytes) -> None:
        self._tell(worker, say.Drop(client, digest))

    def _upload(self, client: str, digest: bytes) -> Upload | None:
        upload = self._round.current.uploads.get(client) if self._round else None
        return upload if upload and upload.offer.update.digest == digest else None

    def _resolved(self, worker: int, client: str) -> Upload | None:
        """The upload that was with this worker, which is not there any more."""
        holder, upload = self._round.in_work.get(client, (None, None)) if self._round else (None, None)
        if holder != worker or upload is None or self._round is None:
            return None
        del self._round.in_work[client]
        upload.in_work = False
        return upload


@functools.lru_cache(maxsize=256)
def _encoded(training: TrainingConfig) -> bytes:
    """Most clients are told the same."""
    return msgspec.msgpack.encode(training)

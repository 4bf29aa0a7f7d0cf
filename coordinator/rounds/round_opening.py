"""Opening a round, or taking up what an earlier process has left of it."""

from __future__ import annotations

import os
from collections.abc import Callable

from edgetrain.coordinator.beside import Beside
from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.rounds.downlink import Downlink, Release
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Part, Round
from edgetrain.coordinator.rounds.uploads import accepted_record
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.strategies import ServerState, Strategy
from edgetrain.protocol.codecs import Limits
from edgetrain.protocol.messages import Patch
from edgetrain.protocol.vectors import Vector


class RoundOpening:
    """Opens rounds.

    Args:
        config: the settings.
        strategy: folds the updates.
        directory: of the run.
        downlink: compresses the way down.
        blobs: serves what clients fetch.
        roster: the clients.
        max_update_bytes: of one update.
        clock: monotonic seconds.
        workers: that take the updates; 0 if none do.
    """

    def __init__(
        self,
        config: FederationConfig,
        *,
        strategy: Strategy,
        directory: RunDirectory,
        downlink: Downlink,
        blobs: BlobServer,
        roster: Roster,
        max_update_bytes: int,
        clock: Callable[[], float],
        workers: int,
    ) -> None:
        self._config = config
        self._strategy = strategy
        self._directory = directory
        self._downlink = downlink
        self._blobs = blobs
        self._roster = roster
        self._max_update_bytes = max_update_bytes
        self._clock = clock
        self._workers = workers
        # Of a round that is not open yet: its number, its parameters, what its clients get.
        self._prepared: tuple[int, Vector, Beside[Release]] | None = None

    def prepare(self, number: int, parameters: Vector) -> None:
        """Begins to make what the clients of a round will get, beside what else is to be done before it.

        Args:
            number: of the round.
            parameters: to train, float32 [num_parameters]; they must not change.
        """
        self._prepared = (number, parameters, Beside(lambda: self._released(number, parameters)))

    def close(self) -> None:
        """Waits for what was begun."""
        if self._prepared:
            *_, making = self._prepared
            making.join()

    def open(self, number: int, parameters: Vector, server_state: ServerState) -> OpenRound:
        """Opens a round.

        Args:
            number: of the round.
            parameters: to train, float32 [num_parameters].
            server_state: what the strategy remembers.

        Raises:
            RunError: the run directory cannot be written, or holds the journal of another round.
        """
        rounds, num_parameters = self._config.rounds, len(parameters)
        release = self._release(number, parameters)
        collection = Collection(
            self._strategy,
            num_parameters,
            server_state,
            Limits(max_parameters=num_parameters, max_bytes=self._max_update_bytes),
            self._config.limits.max_examples,
        )
        opened = collection.open(
            self._directory,
            RoundOpened(
                run=self._directory.run,
                round=number,
                nonce=os.urandom(16),
                parameters=release.digest,
                salt=os.urandom(16),
            ),
            workers=self._workers,
        )
        state = Round(
            number,
            opened.nonce,
            rounds.goal,
            rounds.least,
            self._clock() + rounds.deadline_seconds,
            grace_seconds=rounds.grace_seconds,
        )
        for client in collection.invited:
            state.place(client, Part.LOST)
        for row in collection.rows:
            self._directory.audit.append(accepted_record(row, collection.digests[row.client], from_journal=True))
        for client, digest in collection.digests.items():
            state.place(client, Part.ACCEPTED)
            if record := self._roster.get(client):
                record.last_accepted = (number, digest)
        control, private = self._strategy.control, self._strategy.private
        return OpenRound(
            state,
            collection,
            control=self._blobs.add(self._downlink.encode(control(num_parameters, server_state), seed=number))
            if control
            else None,
            clip_norm=private.clip_norm(server_state) if private else 0.0,
            vector=release.digest,
            parameters=self._blobs.add(release.whole, release.whole_ref),
            patches=tuple(
                Patch(base=patch.base, blob=self._blobs.add(patch.data, patch.ref)) for patch in release.patches
            ),
        )

    def _release(self, number: int, parameters: Vector) -> Release:
        """The parameters of the round as clients see them; on disk before any update can name them."""
        if self._prepared:
            (prepared, vector, making), self._prepared = self._prepared, None
            release = making.result()
            if prepared == number and vector is parameters:
                return release
        opened = self._directory.opened_round(number)
        if opened and self._downlink.holds(opened.parameters):
            return self._downlink.current()
        return self._released(number, parameters)

    def _released(self, number: int, parameters: Vector) -> Release:
        public = self._downlink.advance(parameters, seed=self._config.seed + number)
        saving = Beside(lambda: self._directory.save_public(number, public)) if self._downlink.compresses else None
        try:
            return self._downlink.current()
        finally:
            if saving:
                saving.result()

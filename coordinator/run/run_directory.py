"""The run directory: everything that a run leaves behind, and what it needs to go on after a stop.

run.json                       which run this is
config.toml                    the settings in force
state.sqlite                   closed rounds, clients, evaluations: the truth; the text files are made from it
clients.json                   names and their keys
journal/round-00001.journal    accepted updates of the rounds that are not yet closed
journal/round-00001/           those that workers have accepted
parameters/round-00001.safetensors   named tensors after a round
parameters.safetensors         the latest
strategy/round-00001.safetensors     what the strategy remembers after a round, if anything
public/round-00001.bin         parameters as clients see them, where the downlink compresses
best.safetensors               those that were best by [stop] metric
evaluations.jsonl              the clients' own evaluations
events.jsonl                   everything that happened
request                        what people asked for: run, pause, stop
audit.jsonl, audit.head        the audit log, see `audit.chain`
serial                         of the last announcement, rounded up
rounds.jsonl                   one line per closed round
clients.csv                    one line per client and round
summary.json                   at the end
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import msgspec

from edgetrain.coordinator.audit.open import open_run_audit
from edgetrain.coordinator.beside import Beside
from edgetrain.coordinator.clients.spread import FederatedEvaluation
from edgetrain.coordinator.config import FederationConfig, to_toml
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.run.journal_reading import read_journal
from edgetrain.coordinator.run.records import ClientRow, KnownClient, RoundRecord, Summary
from edgetrain.coordinator.run.run_identity import load_or_create_run
from edgetrain.coordinator.run.run_log import RunLog
from edgetrain.coordinator.run.run_vectors import RunVectors, round_of
from edgetrain.coordinator.run.serials import Serials
from edgetrain.coordinator.stopping import best_round, metric_series
from edgetrain.coordinator.strategies import ServerState
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.manifest import Manifest
from edgetrain.protocol.signing import SigningKey
from edgetrain.protocol.vectors import Vector


class RunDirectory:
    """One run on disk. Locked: two coordinators cannot run in it.

    Args:
        config: settings; `config.out` is the directory.
        manifest: of the bundle to train.
        bundle_digest: SHA-256 of the manifest.

    Raises:
        RunError: of another run or version, in use, or not writable.
    """

    def __init__(self, config: FederationConfig, manifest: Manifest, bundle_digest: bytes) -> None:
        self.path = Path(config.out)
        self._vectors = RunVectors(self.path, manifest)
        self._saving: tuple[int, Vector, Beside[None]] | None = None
        # What follows the end of a round.
        self._tidying: Beside[None] | None = None
        try:
            (self.path / "journal").mkdir(parents=True, exist_ok=True)
            (self.path / "parameters").mkdir(exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise RunError(f"{self.path}: cannot use the run directory: {error}") from error
        try:
            self._open(config, bundle_digest)
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise RunError(f"{self.path}: cannot use the run directory: {error}") from error
            raise

    def _open(self, config: FederationConfig, bundle_digest: bytes) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.path}: another coordinator runs in this directory") from error
        self.run = load_or_create_run(self.path, federation=config.federation, bundle=bundle_digest)
        settings = to_toml(config).encode()
        write_atomically(self.path / "config.toml", settings, mode=0o600)
        key = Path(config.key) if config.key else self.path.absolute().parent / "coordinator.key"
        self.key = SigningKey.load_or_create(key)
        self._metric = config.stop.metric
        self._log = RunLog(self.path)
        self.serials = Serials(self.path / "serial")
        try:
            # Whoever has something to record appends it here.
            self.audit = open_run_audit(
                self.path,
                run=self.run,
                federation=config.federation,
                bundle=bundle_digest,
                key=self.key,
                rounds=len(self.records),
            )
        except BaseException:
            self._log.close()
            raise

    @property
    def records(self) -> list[RoundRecord]:
        """Of all closed rounds, in order."""
        return self._log.records

    @property
    def evaluations(self) -> list[FederatedEvaluation]:
        """The clients' own evaluations, in order."""
        return self._log.evaluations

    # --- rounds --------------------------------------------------------------------------------------

    def load_parameters(self, initial: Vector) -> tuple[int, Vector]:
        """(last closed round, its parameters); round 0 has the bundle's.

        Raises:
            RunError: the file is missing or not what the round's record says.
        """
        if not self.records:
            return 0, initial
        record = self.records[-1]
        vector = self._vectors.load_parameters(record)
        try:
            best = self.best_round()
            self._vectors.name_latest(record.round, best)
            self._tidy(record.round, best)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error}") from error
        return record.round, vector

    def load_server_state(self) -> ServerState:
        """What the strategy remembers from the last closed round.

        Raises:
            RunError: the file is missing or not what the round's record says.
        """
        return self._vectors.load_state(self.records[-1]) if self.records else {}

    def begin_parameters(self, number: int, parameters: Vector) -> None:
        """Begins to write the parameters after a round, beside what else is to be done before `close_round`.

        Args:
            number: of the round.
            parameters: after it; they must not change.
        """
        self._saving = (number, parameters, Beside(lambda: self._vectors.save_parameters(number, parameters)))

    def _save_parameters(self, number: int, parameters: Vector) -> None:
        if self._saving:
            (begun, vector, saving), self._saving = self._saving, None
            saving.result()
            if begun == number and vector is parameters:
                return
        self._vectors.save_parameters(number, parameters)

    def close_round(
        self,
        record: RoundRecord,
        parameters: Vector,
        rows: list[ClientRow],
        *,
        server_state: ServerState | None = None,
        strategy: str = "",
        clients: list[KnownClient] | None = None,
        tidy_later: bool = False,
    ) -> None:
        """Writes state and parameters, then the database's row that makes the round count, then tidies up.

        Args:
            record: of the round.
            parameters: after it.
            rows: one per client.
            server_state: what the strategy remembers.
            strategy: its name, for people.
            clients: as for `save_clients`.
            tidy_later: do not wait until what nobody needs any more is deleted. What a stop leaves of it is done at
                the next start.

        Raises:
            RunError: not writable; then the round has not closed and its journal is still there.
        """
        try:
            self._end_tidying()
            self._save_parameters(record.round, parameters)
            if server_state:
                digest = self._vectors.save_state(record.round, server_state, strategy)
                record = msgspec.structs.replace(record, server_state_sha256=digest)
            self._log.close_round(record, rows, clients)
            best = self.best_round()
            self._vectors.name_latest(record.round, best)
            self._tidying = Beside(lambda: self._tidy(record.round, best))
            if not tidy_later:
                self._end_tidying()
        except OSError as error:
            raise RunError(f"{self.path}: cannot write round {record.round}: {error}") from error

    def _end_tidying(self) -> None:
        tidying, self._tidying = self._tidying, None
        if tidying:
            tidying.result()

    def _tidy(self, number: int, best: int | None) -> None:
        self._vectors.tidy(number, best)
        for path in (self.path / "journal").glob("round-*.journal"):
            if (journal := round_of(path)) is not None and journal <= number:
                path.unlink()
        for path in (self.path / "journal").glob("round-*/"):
            if (journal := round_of(path)) is not None and journal <= number:
                shutil.rmtree(path)

    def best_round(self) -> int | None:
        """The round with the best [stop] metric; while that has not been measured, with the lowest loss."""
        for metric in (self._metric, "loss"):
            series = metric_series(metric, self.records, self.evaluations)
            if (best := best_round(metric, self.records, series)) is not None:
                return best
        return None

    def add_evaluation(self, evaluation: FederatedEvaluation) -> None:
        """Notes the clients' evaluation; if that makes the round the best, keeps its parameters.

        Raises:
            RunError: not writable.
        """
        try:
            self._log.add_evaluation(evaluation)
            if self.best_round() == evaluation.round:
                self._vectors.keep_best(evaluation.round)
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the evaluation: {error}") from error

    def save_public(self, number: int, vector: Vector) -> None:
        """Keeps the parameters of a round as clients see them, where those differ (see `downlink`).

        Raises:
            RunError: not writable.
        """
        try:
            self._vectors.save_public(number, vector)
        except OSError as error:
            raise RunError(f"{self.path / 'public'}: {error}") from error

    def load_public(self) -> Vector | None:
        """What `save_public` kept of the last round that was opened, if it is right in length.

        What was kept for a round that was then not opened does not count: opened now, it gets the same again.
        """
        closed = len(self.records)
        opened = self.opened_round(closed + 1) is not None
        return self._vectors.load_public(closed + opened)

    # --- the rest ------------------------------------------------------------------------------------

    def journal_path(self, number: int) -> Path:
        """Where the journal of a round is."""
        return self.path / "journal" / f"round-{number:05d}.journal"

    def opened_round(self, number: int) -> RoundOpened | None:
        """How a round was opened that has not closed: as noted here, or else as its journal begins.

        Raises:
            RunError: cannot be read.
        """
        path = self.journal_path(number)
        try:
            if noted := self._log.opened(number):
                return noted
            first = next(read_journal(path), None) if path.exists() else None
        except OSError as error:
            raise RunError(f"{path}: cannot read the journal: {error}") from error
        return first[0] if first and isinstance(first[0], RoundOpened) else None

    def note_opened(self, opened: RoundOpened) -> None:
        """Notes how a round was opened, beside its journal.

        Raises:
            RunError: not writable.
        """
        try:
            self._log.note_opened(opened)
        except OSError as error:
            raise RunError(f"{self.path}: cannot open round {opened.round}: {error}") from error

    def load_clients(self) -> list[KnownClient]:
        """(name, key, last accepted round and digest) of every client seen in this run.

        Raises:
            RunError: damaged, or not readable.
        """
        try:
            return self._log.clients()
        except OSError as error:
            raise RunError(f"{self.path}: cannot read the clients: {error}") from error

    def save_clients(self, clients: list[KnownClient]) -> None:
        """Writes what `load_clients` reads.

        Raises:
            RunError: not writable.
        """
        try:
            self._log.save_clients(clients)
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the clients: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the run atomically.

        Raises:
            RunError: it cannot be written.
        """
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise RunError(f"{self.path / name}: {error}") from error

    def write_summary(self, summary: Summary) -> None:
        """summary.json."""
        self.write("summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")

    def settle(self) -> None:
        """Returns when nothing is written or deleted beside any more; what failed is done at the next start."""
        if self._saving:
            self._saving[2].join()
        if self._tidying:
            self._tidying.join()

    def close(self) -> None:
        """Seals the audit log, closes the database and lets go of the lock."""
        self.settle()
        try:
            self.audit.close()
        finally:
            self._log.close()
            self._lock.close()

"""The run directory: everything that a run leaves behind, and what it needs to go on after a stop.

run.json                       which run this is
config.toml                    the settings in force
clients.json                   names and their keys
journal/round-00001.journal    accepted updates of the rounds that are not yet closed
parameters/round-00001.safetensors   named tensors after a round
parameters.safetensors         the latest
strategy/round-00001.safetensors     what the strategy remembers after a round, if anything
public.bin                     parameters as clients see them, where the downlink compresses
best.safetensors               those that were best by [stop] metric
evaluations.jsonl              the clients' own evaluations
events.jsonl                   everything that happened
request                        what people asked for: run, pause, stop
audit.jsonl, audit.head        the audit log (see `audit.chain`)
serial                         number of the last announcements, rounded up
rounds.jsonl                   one line per closed round: the commit record
clients.csv                    one line per client and round
summary.json                   at the end
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import tomli_w

from edgetrain import __version__
from edgetrain.coordinator.audit import AuditLog
from edgetrain.coordinator.audit.records import Opened, Started
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RunError
from edgetrain.coordinator.journal import Journal, RoundOpened, read_journal
from edgetrain.coordinator.parameters import (
    decode_parameters,
    decode_state,
    encode_parameters,
    encode_state,
    vector_sha256,
)
from edgetrain.coordinator.records import ClientRow, RoundRecord, Summary
from edgetrain.coordinator.serials import Serials
from edgetrain.coordinator.spread import FederatedEvaluation
from edgetrain.coordinator.stopping import best_round, metric_series
from edgetrain.coordinator.strategies import ServerState
from edgetrain.protocol.files import sync_directory, write_atomically
from edgetrain.protocol.manifest import Manifest
from edgetrain.protocol.signing import SigningKey

Vector = npt.NDArray[np.float32]

# Parameters of older rounds are removed, but for the best.
KEEP_PARAMETERS = 3


class _RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int = 1
    run: str
    federation: str
    bundle: str


class _PinnedClient(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    public_key: str
    last_round: int | None = None
    last_digest: str | None = None


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
        self._manifest = manifest
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
        self.run = self._load_or_create_info(config, bundle_digest)
        write_atomically(self.path / "config.toml", tomli_w.dumps(msgspec.to_builtins(config)).encode(), mode=0o600)
        key = Path(config.key) if config.key else self.path.absolute().parent / "coordinator.key"
        self.key = SigningKey.load_or_create(key)
        self._metric = config.stop.metric
        self.records = self._load_records()
        self.evaluations = self._load_evaluations()
        self._trim_rows()
        self.serials = Serials(self.path / "serial")
        # Whoever has something to record appends it here.
        self.audit = AuditLog(
            self.path,
            key=self.key,
            opened=Opened(
                run=self.run.hex(),
                federation=config.federation,
                bundle=bundle_digest.hex(),
                public_key=self.key.public_key.hex(),
                rounds_before=len(self.records),
            ),
        )
        self.audit.append(
            Started(
                edgetrain=__version__,
                config=hashlib.sha256((self.path / "config.toml").read_bytes()).hexdigest(),
                rounds=len(self.records),
            )
        )

    def _load_or_create_info(self, config: FederationConfig, bundle_digest: bytes) -> bytes:
        path = self.path / "run.json"
        if not path.exists():
            info = _RunInfo(run=os.urandom(16).hex(), federation=config.federation, bundle=bundle_digest.hex())
            write_atomically(path, msgspec.json.encode(info))
        try:
            info = msgspec.json.decode(path.read_bytes(), type=_RunInfo)
            run = bytes.fromhex(info.run)
            if len(run) != 16:
                raise ValueError("the run's id has not 16 bytes")
        except (msgspec.DecodeError, ValueError) as error:
            raise RunError(f"{path}: damaged: {error}") from error
        if info.format_version != 1 or info.federation != config.federation or info.bundle != bundle_digest.hex():
            raise RunError(
                f"{self.path}: holds a run of federation {info.federation!r} with bundle {info.bundle[:12]}…, not "
                f"{config.federation!r} with {bundle_digest.hex()[:12]}…; choose another `out`"
            )
        return run

    def _load_records(self) -> list[RoundRecord]:
        path = self.path / "rounds.jsonl"
        data = path.read_bytes() if path.exists() else b""
        records, good = [], 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(msgspec.json.decode(line, type=RoundRecord))
            except msgspec.DecodeError as error:
                raise RunError(f"{path}: line {len(records) + 1} is damaged: {error}") from error
            if records[-1].round != len(records):
                raise RunError(f"{path}: line {len(records)} is of round {records[-1].round}; restore the file")
            good += len(line)
        if good < len(data):
            # A power cut tore the last line: that round did not close, and its journal is still there.
            write_atomically(path, data[:good])
        return records

    # --- parameters ----------------------------------------------------------------------------------

    def load_parameters(self, initial: Vector) -> tuple[int, Vector]:
        """(last closed round, its parameters); round 0 has the bundle's.

        Raises:
            RunError: the file is missing or not what the round's record says.
        """
        if not self.records:
            return 0, initial
        record = self.records[-1]
        path = self._parameters_path(record.round)
        try:
            data = path.read_bytes()
            vector = decode_parameters(data, self._manifest)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot read the parameters of round {record.round}: {error}") from error
        if vector_sha256(vector) != record.parameters_sha256:
            raise RunError(f"{path}: is not what round {record.round} wrote; restore it from a copy")
        try:
            self._tidy(record.round, data)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error}") from error
        return record.round, vector

    def load_server_state(self) -> ServerState:
        """What the strategy remembers from the last closed round.

        Raises:
            RunError: the file is missing or not what the round's record says.
        """
        if not self.records or not self.records[-1].server_state_sha256:
            return {}
        record = self.records[-1]
        path = self._state_path(record.round)
        try:
            data = path.read_bytes()
            state = decode_state(data)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot read what the strategy remembers: {error}") from error
        if hashlib.sha256(data).hexdigest() != record.server_state_sha256:
            raise RunError(f"{path}: is not what round {record.round} wrote; restore it from a copy")
        return state

    def close_round(
        self,
        record: RoundRecord,
        parameters: Vector,
        rows: list[ClientRow],
        *,
        server_state: ServerState | None = None,
        strategy: str = "",
    ) -> None:
        """Writes state, parameters and rows, then the line that makes the round count, then tidies up.

        Args:
            record: of the round.
            parameters: after it.
            rows: one per client.
            server_state: what the strategy remembers.
            strategy: its name, for people.

        Raises:
            RunError: not writable; then the round has not closed and its journal is still there.
        """
        try:
            data = encode_parameters(parameters, self._manifest, record.round)
            write_atomically(self._parameters_path(record.round), data)
            if server_state:
                remembered = encode_state(server_state, strategy)
                self._state_path(record.round).parent.mkdir(exist_ok=True)
                write_atomically(self._state_path(record.round), remembered)
                digest = hashlib.sha256(remembered).hexdigest()
                record = msgspec.structs.replace(record, server_state_sha256=digest)
            self._append_rows(rows)
            self._append("rounds.jsonl", msgspec.json.encode(record) + b"\n")
            self.records.append(record)
            self._tidy(record.round, data)
        except OSError as error:
            raise RunError(f"{self.path}: cannot write round {record.round}: {error}") from error

    def _tidy(self, number: int, parameters: bytes) -> None:
        """What follows when round `number` has closed; repeated at the next start, if a stop came between."""
        latest = self.path / "parameters.safetensors"
        if not latest.exists() or latest.read_bytes() != parameters:
            write_atomically(latest, parameters)
        if self.best_round() == number:
            write_atomically(self.path / "best.safetensors", parameters)
        for path in (self.path / "strategy").glob("round-*.safetensors"):
            if (old := _number(path)) is not None and old < number:
                path.unlink()
        for path in (self.path / "journal").glob("round-*.journal"):
            if (journal := _number(path)) is not None and journal <= number:
                path.unlink()
        for path in (self.path / "parameters").glob("round-*.safetensors"):
            old = _number(path)
            if old is not None and old <= number - KEEP_PARAMETERS and old != self.best_round():
                path.unlink()

    def best_round(self) -> int | None:
        """The round with the best [stop] metric; while that has not been measured, with the lowest loss."""
        for metric in (self._metric, "loss"):
            series = metric_series(metric, self.records, self.evaluations)
            if (best := best_round(metric, self.records, series)) is not None:
                return best
        return None

    def add_evaluation(self, evaluation: FederatedEvaluation) -> None:
        """Appends to evaluations.jsonl; if that makes the round the best, keeps its parameters.

        Raises:
            RunError: not writable.
        """
        try:
            self._append("evaluations.jsonl", msgspec.json.encode(evaluation) + b"\n")
            self.evaluations.append(evaluation)
            path = self._parameters_path(evaluation.round)
            if self.best_round() == evaluation.round and path.exists():
                write_atomically(self.path / "best.safetensors", path.read_bytes())
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the evaluation: {error}") from error

    def _load_evaluations(self) -> list[FederatedEvaluation]:
        path = self.path / "evaluations.jsonl"
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_atomically(path, whole)
        try:
            return [msgspec.json.decode(line, type=FederatedEvaluation) for line in whole.splitlines()]
        except msgspec.DecodeError as error:
            raise RunError(f"{path}: damaged: {error}") from error

    def _parameters_path(self, number: int) -> Path:
        return self.path / "parameters" / f"round-{number:05d}.safetensors"

    def _state_path(self, number: int) -> Path:
        return self.path / "strategy" / f"round-{number:05d}.safetensors"

    def save_public(self, vector: Vector) -> None:
        """Keeps the parameters as clients see them, where those differ (see `downlink`)."""
        self.write("public.bin", np.ascontiguousarray(vector, dtype="<f4").tobytes())

    def load_public(self, manifest: Manifest) -> Vector | None:
        """What `save_public` kept, if it is there and of the right length."""
        path = self.path / "public.bin"
        data = path.read_bytes() if path.exists() else b""
        if len(data) != 4 * manifest.num_parameters:
            return None
        return np.frombuffer(data, dtype="<f4").astype(np.float32)

    # --- the rest ------------------------------------------------------------------------------------

    def journal_path(self, number: int) -> Path:
        """Where the journal of a round is."""
        return self.path / "journal" / f"round-{number:05d}.journal"

    def opened_round(self, number: int) -> RoundOpened | None:
        """The record that opened a round which has not closed."""
        path = self.journal_path(number)
        if not path.exists():
            return None
        first = next(read_journal(path), None)
        return first[0] if first and isinstance(first[0], RoundOpened) else None

    def open_journal(self, number: int) -> Journal:
        """The journal of a round, for appending."""
        return Journal(self.journal_path(number))

    def load_clients(self) -> list[tuple[str, bytes, tuple[int, bytes] | None]]:
        """(name, key, last accepted round and digest) of every client seen in this run."""
        path = self.path / "clients.json"
        if not path.exists():
            return []
        try:
            pinned = msgspec.json.decode(path.read_bytes(), type=list[_PinnedClient])
            return [
                (
                    entry.name,
                    bytes.fromhex(entry.public_key),
                    None if entry.last_round is None else (entry.last_round, bytes.fromhex(entry.last_digest or "")),
                )
                for entry in pinned
            ]
        except (msgspec.DecodeError, ValueError, OSError) as error:
            raise RunError(f"{path}: damaged: {error}") from error

    def save_clients(self, clients: list[tuple[str, bytes, tuple[int, bytes] | None]]) -> None:
        """Writes what `load_clients` reads."""
        pinned = [
            _PinnedClient(
                name=name,
                public_key=key.hex(),
                last_round=last[0] if last else None,
                last_digest=last[1].hex() if last else None,
            )
            for name, key, last in clients
        ]
        self.write("clients.json", msgspec.json.format(msgspec.json.encode(pinned), indent=1))

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

    def close(self) -> None:
        """Seals the audit log and lets go of the lock."""
        try:
            self.audit.close()
        finally:
            self._lock.close()

    def _trim_rows(self) -> None:
        """Drops rows of a round that did not close: they will be written again."""
        path = self.path / "clients.csv"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        closed = [
            line
            for line in lines
            if line.endswith(b"\n")
            and not ((number := line.partition(b",")[0]).isdigit() and int(number) > len(self.records))
        ]
        if closed != lines:
            write_atomically(path, b"".join(closed))

    def _append_rows(self, rows: list[ClientRow]) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ClientRow.__struct_fields__, lineterminator="\n")
        path = self.path / "clients.csv"
        if not path.exists() or not path.stat().st_size:
            writer.writeheader()
        writer.writerows(msgspec.to_builtins(rows))
        self._append("clients.csv", buffer.getvalue().encode())

    def _append(self, name: str, data: bytes) -> None:
        path = self.path / name
        fresh = not path.exists()
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync_directory(self.path)


def _number(path: Path) -> int | None:
    """The round of a file called round-NUMBER."""
    number = path.stem.removeprefix("round-")
    return int(number) if number.isdecimal() else None

"""The coordinator: one thread that owns all state and takes events out of the transport's queue."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgetrain import __version__
from edgetrain.coordinator import events
from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients import ClientRecord, Roster, select_random
from edgetrain.coordinator.collection import Collection
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RoundFailed, UpdateRefused
from edgetrain.coordinator.journal import RoundOpened
from edgetrain.coordinator.rounds import Outcome, Part, Round
from edgetrain.coordinator.run_directory import ClientRow, RoundRecord, RunDirectory, Summary, vector_sha256
from edgetrain.coordinator.stopping import stop_reason
from edgetrain.coordinator.strategies import ServerState, make_strategy
from edgetrain.protocol import BlobError, MessageError
from edgetrain.protocol.blobs import Assembler, parse_chunk
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import CodecSpec, Limits, encode
from edgetrain.protocol.messages import (
    Announce,
    BlobRef,
    Decline,
    Goodbye,
    Hello,
    Message,
    Offer,
    Plan,
    Ready,
    Refusal,
    Report,
    RoundClosed,
    Verdict,
    Want,
    Welcome,
    decode_from_client,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import PROTOCOL_VERSION, VersionError, seal, unseal, verify
from edgetrain.protocol.transport import Connected, Disconnected, Received, Transport

logger = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]

COORDINATOR = "coordinator"
# Events handled before the journal is synced and the verdicts go out: one sync serves them all.
BATCH_EVENTS = 256
# An upload that has not moved for so long is asked for again.
STALL_SECONDS = 3.0
# Upper bound of one wait for events, so that a clock or a deadline is looked at now and then.
POLL_SECONDS = 0.5
# Clients have so long to evaluate the final parameters.
REPORT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss and, where the bundle counts it, accuracy."""

    loss: float
    accuracy: float | None


@dataclass(slots=True)
class _Upload:
    """An update on its way in."""

    offer: Offer
    envelope: bytes
    assembler: Assembler
    moved_at: float


@dataclass(slots=True)
class _Current:
    """The round that is open."""

    round: Round
    collection: Collection
    parameters: BlobRef
    invited_once: bool = False
    uploads: dict[str, _Upload] = field(default_factory=dict)
    refused: int = 0


class Coordinator:
    """Runs a federation from the first client to the summary.

    Args:
        config: the settings.
        bundle: to train.
        transport: connected.
        directory: where the run lives; if it holds closed rounds, the run goes on after them.
        evaluate: loss and accuracy of parameters on held-out data, or None.
        observe: is told what happens, in the coordinator's thread.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: FederationConfig,
        *,
        bundle: Bundle,
        transport: Transport,
        directory: RunDirectory,
        evaluate: Callable[[Vector], Evaluation] | None = None,
        observe: events.Observer = lambda _event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._bundle = bundle
        self._transport = transport
        self._directory = directory
        self._evaluate = evaluate
        self._observe = observe
        self._clock = clock
        CodecSpec.parse(config.codec)
        self._strategy = make_strategy(config.strategy)
        self._server_state: ServerState = {}
        self._topics = Topics(config.federation)
        self._roster = Roster()
        for name, key, last in directory.load_clients():
            self._roster.add(ClientRecord(name, key, last_accepted=last))
        self._blobs = BlobServer(self._topics, transport.publish, config.limits.chunk_bytes)
        self._announced: BlobRef | None = None
        self._num_parameters = bundle.manifest.num_parameters
        dense = 4 * self._num_parameters + self._num_parameters // 8 + 4096
        self._max_update_bytes = config.limits.max_update_bytes or dense
        self._limits = Limits(max_parameters=self._num_parameters, max_bytes=self._max_update_bytes)
        self._current: _Current | None = None
        # Verdicts that wait for the journal to be synced.
        self._verdicts: list[tuple[str, Verdict]] = []
        self._report_plan: Plan | None = None
        self._reports: dict[str, Report] = {}
        self._evaluations: dict[int, Evaluation] = {}
        self._bytes_down_counted = 0
        self._started = clock()
        self._round_number, self._parameters = directory.load_parameters(bundle.initial_parameters())

    # --- the run -------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Runs until a stop condition holds.

        Raises:
            RoundFailed: too few clients, too often.
            RunError: the run directory cannot be written.
            KeyboardInterrupt: after the run was left so that it can go on later.
        """
        try:
            self._open()
            reason = self._run_rounds()
            if self._config.evaluation.by_clients and self._round_number:
                self._collect_reports()
        except KeyboardInterrupt:
            self._finish("interrupted", "interrupted; the same command goes on where it stopped", announce="paused")
            raise
        except RoundFailed as error:
            self._finish("failed", str(error), announce="ended")
            raise
        finally:
            if self._current:
                self._current.collection.close()
        return self._finish("completed", reason, announce="ended")

    def _open(self) -> None:
        self._announced = self._blobs.add(self._bundle.manifest_bytes)
        for entry in self._bundle.manifest.files():
            self._blobs.add(self._bundle.read(entry))
        self._transport.subscribe(self._topics.from_client("+", "#"))
        self._announce("open")
        if self._round_number == 0:
            self._evaluate_round(0, self._parameters)

    def _run_rounds(self) -> str:
        while True:
            history = [(record.loss, record.accuracy) for record in self._directory.records]
            if reason := stop_reason(self._config.stop, history):
                return reason
            if self._round_number >= self._config.rounds.total:
                return f"all {self._config.rounds.total} rounds done"
            self._run_round(self._round_number + 1)

    def _run_round(self, number: int) -> None:
        rounds = self._config.rounds
        current = self._current = self._open_round(number)
        failures = 0
        while True:
            self._gather(current)
            self._invite(current)
            self._pump(lambda: current.round.outcome(self._clock()) is not Outcome.OPEN)
            if current.round.outcome(self._clock()) is Outcome.CLOSED:
                break
            failures += 1
            accepted = current.round.count(Part.ACCEPTED)
            message = (
                f"round {number}, attempt {current.round.attempt}: {accepted} of at least {rounds.least} updates"
            )
            logger.warning("%s", message)
            if rounds.max_failures and failures >= rounds.max_failures:
                raise RoundFailed(
                    f"{message}, after {failures} attempts. Lower rounds.minimum, raise rounds.deadline_seconds, "
                    "or look at the clients' logs; the run can go on from here."
                )
            current.round.attempt += 1
        self._close_round(current)

    def _open_round(self, number: int) -> _Current:
        rounds = self._config.rounds
        data = encode(self._parameters, "dense|float32")
        reference = self._blobs.add(data)
        collection = Collection(
            self._strategy,
            self._num_parameters,
            self._server_state,
            self._limits,
            self._config.limits.max_examples,
        )
        opened = collection.open(
            self._directory,
            RoundOpened(
                run=self._directory.run, round=number, nonce=os.urandom(16), parameters=reference.digest
            ),
        )
        now = self._clock()
        state = Round(number, opened.nonce, rounds.goal, rounds.least, now, now + rounds.deadline_seconds)
        for client, digest in collection.digests.items():
            state.parts[client] = Part.ACCEPTED
            if record := self._roster.get(client):
                record.last_accepted = (number, digest)
        return _Current(state, collection, reference)

    def _gather(self, current: _Current) -> None:
        """Waits until enough clients are there. The first round of a run waits for the goal, for a while."""
        rounds = self._config.rounds
        start = self._clock()
        patient = self._round_number == 0 and current.round.attempt == 1
        shown = -1

        def enough() -> bool:
            nonlocal shown
            ready = len(self._pool(current))
            accepted = current.round.count(Part.ACCEPTED)
            now = self._clock()
            if accepted >= rounds.goal or ready + accepted >= rounds.goal:
                return True
            waited = now - start
            if ready and ready + accepted >= rounds.least and (not patient or waited >= rounds.gather_seconds):
                return True
            if rounds.idle_timeout_seconds and waited > rounds.idle_timeout_seconds:
                raise RoundFailed(
                    f"round {current.round.number}: {ready} clients ready after {waited:.0f} s, "
                    f"{rounds.least - accepted} are needed"
                )
            if ready != shown:
                shown = ready
                self._observe(events.Waiting(ready, rounds.goal - accepted))
            return False

        self._pump(enough)

    def _pool(self, current: _Current) -> list[str]:
        return [name for name in self._roster.eligible() if name not in current.collection.digests]

    def _invite(self, current: _Current) -> None:
        state, rounds = current.round, self._config.rounds
        needed = rounds.goal - state.count(Part.ACCEPTED)
        chosen = select_random(
            self._pool(current),
            int(np.ceil(needed * rounds.over_selection)),
            seed=self._config.seed,
            round_number=state.number,
            attempt=state.attempt,
        )
        now = self._clock()
        if not current.invited_once:
            state.opened_at = now
            current.invited_once = True
        state.deadline_at = now + rounds.deadline_seconds
        self._blobs.add(encode(self._parameters, "dense|float32"), audience=len(chosen))
        for name in chosen:
            state.invite(name)
            self._send(name, self._plan(current))
        self._observe(events.RoundStarted(state.number, state.attempt, len(chosen)))

    def _plan(self, current: _Current) -> Plan:
        return Plan(
            run=self._directory.run,
            round=current.round.number,
            nonce=current.round.nonce,
            bundle=self._bundle.digest,
            parameters=current.parameters,
            training=self._config.training,
            codec=self._config.codec,
            deadline_seconds=max(0.0, current.round.deadline_at - self._clock()),
            seed=self._config.seed,
        )

    def _close_round(self, current: _Current) -> None:
        state, collection = current.round, current.collection
        self._transport.publish(
            self._topics.round,
            self._seal(RoundClosed(run=self._directory.run, round=state.number, nonce=state.nonce)),
        )
        parameters, server_state = self._strategy.finish(collection.partial, self._parameters, self._server_state)
        evaluation = None
        last = state.number >= self._config.rounds.total
        if last or state.number % self._config.evaluation.every == 0:
            evaluation = self._evaluate_round(state.number, parameters)
        weights = [(row.loss, row.num_examples) for row in collection.rows if row.loss is not None]
        total = sum(weight for _, weight in weights)
        record = RoundRecord(
            round=state.number,
            attempts=state.attempt,
            seconds=round(self._clock() - state.opened_at, 4),
            invited=len(state.parts),
            accepted=state.count(Part.ACCEPTED),
            declined=state.count(Part.DECLINED),
            refused=current.refused,
            lost=len(state.parts) - state.count(Part.ACCEPTED, Part.DECLINED, Part.REFUSED),
            loss=evaluation.loss if evaluation else None,
            accuracy=evaluation.accuracy if evaluation else None,
            train_loss=sum(loss * weight for loss, weight in weights) / total if total else None,
            num_examples=sum(row.num_examples for row in collection.rows),
            bytes_up=collection.update_bytes,
            bytes_up_float32=4 * self._num_parameters * len(collection.digests),
            bytes_down=self._bytes_down(),
            parameters_sha256=vector_sha256(parameters),
        )
        rows = collection.rows + [
            ClientRow(round=state.number, client=name, status=part.value)
            for name, part in sorted(state.parts.items())
            if part is not Part.ACCEPTED
        ]
        self._save_clients()
        self._directory.close_round(record, parameters, rows, best=self._best_round(state.number, evaluation))
        collection.close()
        self._blobs.remove(current.parameters)
        self._parameters, self._server_state = parameters, server_state
        self._round_number = state.number
        self._current = None
        self._observe(events.RoundEnded(record))

    def _evaluate_round(self, number: int, parameters: Vector) -> Evaluation | None:
        if self._evaluate is None:
            return None
        evaluation = self._evaluations[number] = self._evaluate(parameters)
        self._observe(events.Evaluated(number, evaluation.loss, evaluation.accuracy))
        return evaluation

    def _best_round(self, number: int, evaluation: Evaluation | None) -> int | None:
        """The round with the lowest held-out loss so far, this one included."""
        losses = [(record.loss, record.round) for record in self._directory.records if record.loss is not None]
        if evaluation:
            losses.append((evaluation.loss, number))
        return min(losses)[1] if losses else None

    def _bytes_down(self) -> int:
        """Bytes that clients say they received since this was asked last."""
        total = sum(record.resources.bytes_received for record in self._roster.all())
        fresh, self._bytes_down_counted = total - self._bytes_down_counted, total
        return max(0, fresh)

    def _collect_reports(self) -> None:
        """Lets every client evaluate the final parameters on its own validation data."""
        clients = self._roster.eligible()
        if not clients:
            return
        reference = self._blobs.add(encode(self._parameters, "dense|float32"), audience=len(clients))
        deadline = self._clock() + REPORT_SECONDS
        self._report_plan = Plan(
            run=self._directory.run,
            round=self._round_number,
            nonce=os.urandom(16),
            task="evaluate",
            bundle=self._bundle.digest,
            parameters=reference,
            deadline_seconds=REPORT_SECONDS,
        )
        for name in clients:
            self._send(name, self._report_plan)
        self._pump(
            lambda: (
                self._clock() >= deadline
                or all(name in self._reports or not self._roster[name].online for name in clients)
            )
        )

    def _finish(self, status: str, reason: str, *, announce: str) -> Summary:
        self._announce(announce, reason)
        self._save_clients()
        records = self._directory.records
        last = records[-1] if records else None
        updates = sum(record.accepted for record in records)
        update_bytes = sum(record.bytes_up for record in records)
        float32 = sum(record.bytes_up_float32 for record in records)
        seconds = sum(record.seconds for record in records)
        accuracies = [record.accuracy for record in records if record.accuracy is not None]
        summary = Summary(
            federation=self._config.federation,
            status=status,
            reason=reason,
            rounds=len(records),
            clients=sum(1 for record in self._roster.all() if record.last_accepted),
            final_accuracy=last.accuracy if last else None,
            final_loss=last.loss if last else None,
            best_accuracy=max(accuracies, default=None),
            bytes_up=update_bytes,
            bytes_up_float32=float32,
            bytes_down=sum(record.bytes_down for record in records),
            update_bytes_mean=round(update_bytes / updates, 1) if updates else 0.0,
            reduction=round(float32 / update_bytes, 2) if update_bytes else 0.0,
            seconds=round(self._clock() - self._started, 3),
            seconds_per_round=round(seconds / len(records), 4) if records else 0.0,
            client_peak_mb=max((record.resources.peak_memory_mb for record in self._roster.all()), default=0.0),
            accuracy_by_client={
                name: report.metrics["accuracy"]
                for name, report in sorted(self._reports.items())
                if "accuracy" in report.metrics
            },
        )
        self._directory.write_summary(summary)
        self._observe(events.RunEnded(summary))
        return summary

    # --- events --------------------------------------------------------------------------------------

    def _pump(self, done: Callable[[], bool]) -> None:
        """Handles events until `done`."""
        while True:
            now = self._clock()
            self._blobs.tick(now)
            self._ask_for_stalled(now)
            if done():
                return
            event = self._transport.receive(self._patience(now))
            for _ in range(BATCH_EVENTS):
                if event is None:
                    break
                if isinstance(event, Received):
                    self._on_received(event)
                elif isinstance(event, Disconnected):
                    logger.warning("lost the broker: %s; reconnecting", event.reason)
                elif isinstance(event, Connected):
                    self._announce("open")
                event = self._transport.receive(0)
            self._send_verdicts()

    def _patience(self, now: float) -> float:
        due = [now + POLL_SECONDS]
        if (blob := self._blobs.next_due()) is not None:
            due.append(blob)
        if self._current:
            due.append(self._current.round.deadline_at)
        return max(0.001, min(due) - now)

    def _on_received(self, event: Received) -> None:
        sender = self._topics.sender(event.topic)
        if sender is None:
            return
        client, kind = sender
        if record := self._roster.get(client):
            record.bytes_up += len(event.payload)
        try:
            if kind == "blob":
                self._on_chunk(client, event.payload)
            elif kind == "message":
                self._on_message(client, event.payload)
        except VersionError as error:
            self._refuse(
                client,
                f"this client speaks protocol version {error.version}, the coordinator {PROTOCOL_VERSION}: "
                "install the same version of edgetrain on both",
            )
            self._send(client, Refusal(reason=f"the coordinator runs edgetrain {__version__}: {error}"))
        except (MessageError, BlobError) as error:
            self._refuse(client, str(error))

    def _on_message(self, client: str, payload: bytes) -> None:
        envelope = unseal(payload)
        if envelope.sender != client:
            raise MessageError(f"claims to be from {envelope.sender!r}")
        message = decode_from_client(envelope.body)
        record = self._roster.get(client)
        if isinstance(message, Hello):
            verify(envelope, self._config.federation, message.public_key)
            self._on_hello(client, message)
            return
        if record is None:
            # It was here before we were: let it introduce itself again.
            self._announce("open")
            return
        verify(envelope, self._config.federation, record.public_key)
        match message:
            case Ready():
                self._on_ready(record, message)
            case Decline():
                self._on_decline(client, message)
            case Offer():
                self._on_offer(record, message, payload)
            case Want():
                self._on_want(client, message)
            case Report():
                self._on_report(record, message)
            case Goodbye():
                self._on_goodbye(record, message)

    def _on_hello(self, client: str, hello: Hello) -> None:
        record = self._roster.get(client)
        if record is None:
            record = ClientRecord(client, hello.public_key)
            self._roster.add(record)
        elif record.public_key != hello.public_key:
            reason = f"the name {client!r} belongs to another key in this run: choose another name"
            self._refuse(client, reason)
            self._send(client, Refusal(reason=reason))
            return
        record.connection = hello.connection
        record.device = hello.device
        record.online = True
        record.ready = False
        self._send(client, Welcome(run=self._directory.run))

    def _on_ready(self, record: ClientRecord, ready: Ready) -> None:
        if ready.bundle != self._bundle.digest:
            self._send(record.name, Refusal(reason="has another bundle than this run trains"))
            return
        if not record.ready:
            self._observe(events.ClientJoined(record.name, ready.num_examples))
        record.online = record.ready = True
        record.num_examples, record.runtime = ready.num_examples, ready.runtime
        current = self._current
        if current and current.round.parts.get(record.name) in {Part.INVITED, Part.TRAINING, Part.LOST}:
            # Back in the middle of a round: it may have lost the plan.
            current.round.advance(record.name, Part.INVITED)
            self._send(record.name, self._plan(current))
        elif self._report_plan and record.name not in self._reports:
            self._send(record.name, self._report_plan)

    def _on_decline(self, client: str, decline: Decline) -> None:
        current = self._current
        if current and decline.nonce == current.round.nonce:
            current.round.advance(client, Part.DECLINED)
            logger.info("%s declines round %d: %s", client, decline.round, decline.reason)

    def _on_want(self, client: str, want: Want) -> None:
        current = self._current
        if current and want.digest == current.parameters.digest and current.round.waits_for(client):
            current.round.advance(client, Part.TRAINING)
        if not self._blobs.want(client, want.digest, want.ranges, self._clock()):
            logger.debug("%s wants a blob that is no more: %s", client, want.digest.hex()[:12])

    def _on_offer(self, record: ClientRecord, offer: Offer, envelope: bytes) -> None:
        current = self._current
        client = record.name
        if record.last_accepted == (offer.round, offer.update.digest):
            # A duplicate of what is already in: say so once more, after the sync if it is not through yet.
            self._verdicts.append((client, _verdict(offer, accepted=True)))
        elif not current or (offer.run, offer.round, offer.nonce) != (
            self._directory.run,
            current.round.number,
            current.round.nonce,
        ):
            self._reject(client, offer, f"round {offer.round} is closed: too late")
        elif client in current.collection.digests:
            self._reject(client, offer, "an update of this client is already in the round")
        elif client not in current.round.parts:
            self._reject(client, offer, "not invited to this round")
        elif offer.update.size > self._max_update_bytes:
            current.round.advance(client, Part.REFUSED)
            self._reject(
                client,
                offer,
                f"the update has {offer.update.size} bytes, allowed are {self._max_update_bytes}",
            )
        else:
            known = current.uploads.get(client)
            if known is None or known.offer.update != offer.update:
                assembler = Assembler(offer.update, limit=self._max_update_bytes)
                current.uploads[client] = _Upload(offer, envelope, assembler, self._clock())
            current.round.advance(client, Part.COLLECTING)

    def _on_chunk(self, client: str, payload: bytes) -> None:
        chunk = parse_chunk(payload)
        current = self._current
        upload = current.uploads.get(client) if current else None
        if not current or upload is None or chunk.digest != upload.offer.update.digest:
            return  # late, or ahead of its offer: it will be asked for if it is needed
        upload.moved_at = self._clock()
        if not upload.assembler.add(chunk):
            return
        offer = upload.offer
        del current.uploads[client]
        try:
            current.collection.accept(client, offer, upload.envelope, upload.assembler.finish())
        except (UpdateRefused, BlobError) as error:
            current.round.advance(client, Part.REFUSED)
            self._reject(client, offer, str(error))
            return
        record = self._roster[client]
        record.last_accepted = (offer.round, offer.update.digest)
        record.resources = offer.resources
        current.round.advance(client, Part.ACCEPTED)
        self._verdicts.append((client, _verdict(offer, accepted=True)))
        self._observe(
            events.UpdateAccepted(
                offer.round, client, offer.update.size, current.round.count(Part.ACCEPTED)
            )
        )

    def _on_report(self, record: ClientRecord, report: Report) -> None:
        if self._report_plan and report.nonce == self._report_plan.nonce:
            if all(np.isfinite(value) for value in report.metrics.values()):
                self._reports[record.name] = report
            record.resources = report.resources

    def _on_goodbye(self, record: ClientRecord, goodbye: Goodbye) -> None:
        if goodbye.connection != record.connection or not record.online:
            return
        record.online = record.ready = False
        current = self._current
        if current and current.round.waits_for(record.name):
            current.round.advance(record.name, Part.LOST)
        self._observe(events.ClientLeft(record.name, goodbye.reason))

    def _ask_for_stalled(self, now: float) -> None:
        if not self._current:
            return
        for client, upload in self._current.uploads.items():
            if now - upload.moved_at >= STALL_SECONDS:
                upload.moved_at = now
                missing = tuple(upload.assembler.missing()[:1024])
                self._send(client, Want(digest=upload.offer.update.digest, ranges=missing))

    # --- sending -------------------------------------------------------------------------------------

    def _send_verdicts(self) -> None:
        """Syncs the journal once, then tells all whose updates it covers."""
        if not self._verdicts:
            return
        if self._current:
            self._current.collection.commit()
        for client, verdict in self._verdicts:
            self._send(client, verdict)
        self._verdicts.clear()

    def _reject(self, client: str, offer: Offer, reason: str) -> None:
        if self._current:
            self._current.refused += 1
        self._refuse(client, reason)
        self._send(client, _verdict(offer, accepted=False, reason=reason))

    def _refuse(self, client: str, reason: str) -> None:
        logger.warning("refused from %s: %s", client, reason)
        self._observe(events.Refused(client, reason))

    def _seal(self, message: Message) -> bytes:
        return seal(self._directory.key, self._config.federation, COORDINATOR, encode_message(message))

    def _send(self, client: str, message: Message) -> None:
        self._transport.publish(self._topics.to_client(client, "message"), self._seal(message))

    def _announce(self, status: str, reason: str = "") -> None:
        assert self._announced is not None, "the bundle is known by then"
        message = Announce(
            run=self._directory.run,
            public_key=self._directory.key.public_key,
            edgetrain=__version__,
            bundle=self._announced,
            status=status,  # type: ignore[arg-type]
            reason=reason[:1000],
            serial=time.time_ns() // 1_000_000,
        )
        self._transport.publish(self._topics.announce, self._seal(message), retain=True)

    def _save_clients(self) -> None:
        self._directory.save_clients(
            [(record.name, record.public_key, record.last_accepted) for record in self._roster.all()]
        )


def _verdict(offer: Offer, *, accepted: bool, reason: str = "") -> Verdict:
    return Verdict(round=offer.round, digest=offer.update.digest, accepted=accepted, reason=reason[:1000])

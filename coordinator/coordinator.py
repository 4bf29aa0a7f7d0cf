"""The coordinator: one thread that owns all state and takes events out of the transport's queue."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator import events
from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients import ClientRecord, Roster
from edgetrain.coordinator.collection import Collection
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.deadlines import deadline_seconds
from edgetrain.coordinator.downlink import WHOLE, Downlink, Release
from edgetrain.coordinator.errors import RoundFailed, StopRequested
from edgetrain.coordinator.history import History
from edgetrain.coordinator.intake import Intake
from edgetrain.coordinator.invitations import Invitations, checked_strategy
from edgetrain.coordinator.journal import RoundOpened
from edgetrain.coordinator.open_round import OpenRound
from edgetrain.coordinator.past_run import read_rows
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.records import Summary
from edgetrain.coordinator.reports import client_rows, round_record, summarize
from edgetrain.coordinator.requests import Request, read_request, write_request
from edgetrain.coordinator.rounds import Outcome, Part, Round
from edgetrain.coordinator.run_directory import RunDirectory
from edgetrain.coordinator.spread import evaluation_of
from edgetrain.coordinator.stopping import metric_series, stop_reason
from edgetrain.coordinator.strategies import described
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import CodecSpec, Limits, encode
from edgetrain.protocol.groups import elements_of
from edgetrain.protocol.messages import Patch, RoundClosed
from edgetrain.protocol.names import Topics
from edgetrain.protocol.transport import Connected, Disconnected, Received, Transport

logger = logging.getLogger(__name__)

Vector = npt.NDArray[np.float32]

# Events handled before the journal is synced and the verdicts go out: one sync serves them all.
BATCH_EVENTS = 256
# Upper bound of one wait for events, so that deadlines are looked at now and then.
POLL_SECONDS = 0.5
# Clients have so long to evaluate the final parameters.
REPORT_SECONDS = 60.0
# A failed round is tried again after a pause that doubles from one second up to this.
MAX_RETRY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out loss and, where the bundle counts it, accuracy."""

    loss: float
    accuracy: float | None


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

    Raises:
        CodecError, ConfigError: the settings name a codec or a strategy that there is not.
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
        self._downlink = Downlink(CodecSpec.parse(config.downlink_codec), directory.load_public(bundle.manifest))
        self._config = config
        self._bundle = bundle
        self._transport = transport
        self._directory = directory
        self._evaluate = evaluate
        self._observe = observe
        self._clock = clock
        self._strategy = checked_strategy(config)
        self._server_state = directory.load_server_state()
        self._num_parameters = bundle.manifest.num_parameters
        # What the devices keep to themselves stays as it was exported here.
        self._personal = elements_of(bundle.manifest, config.personal)
        # As announced last: what whoever connects later is told.
        self._status: tuple[Literal["open", "paused", "ended"], str] = ("open", "")
        self._round_number, self._parameters = directory.load_parameters(bundle.initial_parameters())
        # What no codec exceeds, and a little.
        dense = 4 * self._num_parameters + self._num_parameters // 8 + 4096
        dense *= 2 if self._strategy.control else 1
        self._max_update_bytes = config.limits.max_update_bytes or dense
        self._history = History()
        self._history.add(read_rows(directory.path / "clients.csv"))
        self._roster = Roster()
        for name, key, last in directory.load_clients():
            self._roster.add(ClientRecord(name, key, last_accepted=last))
        self._topics = Topics(config.federation)
        self._blobs = BlobServer(self._topics, transport, config.limits.chunk_bytes)
        self._post = Post(
            transport,
            self._topics,
            directory.key,
            run=directory.run,
            bundle=self._blobs.add(bundle.manifest_bytes),
        )
        self._invitations = Invitations(
            config,
            strategy=self._strategy,
            roster=self._roster,
            history=self._history,
            run=directory.run,
            bundle=bundle.digest,
            clock=clock,
        )
        self._intake = Intake(
            topics=self._topics,
            run=directory.run,
            bundle=bundle.digest,
            post=self._post,
            blobs=self._blobs,
            roster=self._roster,
            plan=self._invitations.plan,
            max_update_bytes=self._max_update_bytes,
            uploads=directory.path / "uploads",
            observe=observe,
            clock=clock,
        )
        self._intake.come_back = lambda client: self._invitations.come_back_seconds(client, directory.records)
        self._resumed = self._round_number > 0
        self._clients_saved = len(self._roster)
        # Before its first round, a coordinator waits a while for all that are there.
        self._gathered = False
        self._started = clock()

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
                self._ask_clients_for_reports(self._parameters)
        except StopRequested:
            reason = "stopped on request; the same command goes on where it stopped"
            self._announce("ended", reason)
            return self._summarize("stopped", reason)
        except KeyboardInterrupt:
            self._announce("paused", "the coordinator was interrupted")
            self._summarize("interrupted", "interrupted; the same command goes on where it stopped")
            raise
        except RoundFailed as error:
            self._announce("ended", str(error))
            self._summarize("failed", str(error))
            raise
        finally:
            if self._intake.current:
                self._intake.current.collection.close()
        self._announce("ended", reason)
        return self._summarize("completed", reason)

    def _open(self) -> None:
        if read_request(self._directory.path) == "stop":
            # It was obeyed by the process before.
            write_request(self._directory.path, "run")
        for entry in self._bundle.manifest.files():
            self._blobs.add(self._bundle.map(entry))
        # The announcement follows when the transport says that it is connected.
        for kind in ("message", "blob"):
            self._transport.subscribe(self._topics.from_client("+", kind))
        if self._round_number == 0:
            self._evaluate_after(0, self._parameters)

    def _run_rounds(self) -> str:
        while True:
            self._pause_if_asked()
            records, stop = self._directory.records, self._config.stop
            history = [(record.loss, record.accuracy) for record in records]
            series = metric_series(stop.metric, records, self._directory.evaluations)
            if reason := stop_reason(stop, history, series):
                return reason
            if self._round_number >= self._config.rounds.total:
                return f"all {self._config.rounds.total} rounds done"
            self._run_round(self._round_number + 1)
            every = self._config.evaluation.by_clients_every
            if every and self._round_number % every == 0:
                self._evaluate_by_clients()

    def _pause_if_asked(self) -> None:
        if self._request() != "pause":
            return
        self._announce("paused", "paused on request")
        self._observe(events.Paused())
        self._pump(lambda: self._request() != "pause")
        self._announce("open")
        self._observe(events.Resumed())

    def _request(self) -> Request:
        """What people ask for.

        Raises:
            StopRequested: to end.
        """
        request = read_request(self._directory.path)
        if request == "stop":
            raise StopRequested
        return request

    def _announce(self, status: Literal["open", "paused", "ended"], reason: str = "") -> None:
        self._status = (status, reason)
        self._post.announce(status, reason)

    # --- one round -----------------------------------------------------------------------------------

    def _run_round(self, number: int) -> None:
        rounds = self._config.rounds
        current = self._intake.current = self._open_round(number)
        state = current.state
        failures = 0
        while True:
            if state.count(Part.ACCEPTED) < rounds.goal:
                self._gather(current)
                self._invite(current)
                self._pump(lambda: state.outcome(self._clock()) is not Outcome.OPEN)
            if state.outcome(self._clock()) is Outcome.CLOSED:
                break
            failures += 1
            message = (
                f"round {number}, attempt {state.attempt}: {state.count(Part.ACCEPTED)} updates "
                f"of at least {rounds.least}"
            )
            logger.warning("%s", message)
            if rounds.max_failures and failures >= rounds.max_failures:
                raise RoundFailed(
                    f"{message}, after {failures} attempts{_said(current)}. Lower rounds.minimum, raise "
                    "rounds.deadline_seconds, or look at the clients' logs; the run can go on from here."
                )
            state.attempt += 1
            retry_at = self._clock() + min(2.0 ** (failures - 1), MAX_RETRY_SECONDS)
            self._pump(lambda at=retry_at: self._clock() >= at or state.count(Part.ACCEPTED) >= rounds.goal)  # type: ignore[misc]
        self._close_round(current)

    def _open_round(self, number: int) -> OpenRound:
        """Opens the round, or takes up what an earlier process has left of it."""
        rounds = self._config.rounds
        release = self._release(number)
        collection = Collection(
            self._strategy,
            self._num_parameters,
            self._server_state,
            Limits(max_parameters=self._num_parameters, max_bytes=self._max_update_bytes),
            self._config.limits.max_examples,
        )
        opened = collection.open(
            self._directory,
            RoundOpened(run=self._directory.run, round=number, nonce=os.urandom(16), parameters=release.digest),
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
            state.parts[client] = Part.LOST
        for client, digest in collection.digests.items():
            state.parts[client] = Part.ACCEPTED
            if record := self._roster.get(client):
                record.last_accepted = (number, digest)
        control = self._strategy.control
        return OpenRound(
            state,
            collection,
            control=self._blobs.add(
                self._downlink.encode(control(self._num_parameters, self._server_state), seed=number)
            )
            if control
            else None,
            vector=release.digest,
            parameters=self._blobs.add(release.whole),
            patches=tuple(Patch(base=patch.base, blob=self._blobs.add(patch.data)) for patch in release.patches),
        )

    def _release(self, number: int) -> Release:
        """The parameters of the round as clients see them; on disk before any update can name them."""
        opened = self._directory.opened_round(number)
        if opened and self._downlink.holds(opened.parameters):
            return self._downlink.current()
        release = self._downlink.release(self._parameters, seed=self._config.seed + number)
        if release.patches:
            self._directory.save_public(release.public)
        return release

    def _gather(self, current: OpenRound) -> None:
        """Waits until enough clients are there; the first time a while longer, for all of them."""
        rounds = self._config.rounds
        patience = 0.0 if self._gathered else rounds.gather_seconds
        self._gathered = True
        start = self._clock()
        shown: int | None = None

        def enough() -> bool:
            nonlocal shown
            ready = len(self._invitations.pool(current))
            accepted = current.state.count(Part.ACCEPTED)
            waited = self._clock() - start
            if ready + accepted >= rounds.goal:
                return True
            # If only those are here whose updates an earlier process has accepted, the round ends as at its deadline.
            if ready + accepted >= rounds.least and waited >= (patience if ready else rounds.deadline_seconds):
                return True
            if rounds.idle_timeout_seconds and waited > rounds.idle_timeout_seconds:
                raise RoundFailed(
                    f"round {current.state.number}: {ready} clients are ready after {waited:.0f} s, "
                    f"{rounds.least - accepted} are needed"
                )
            if ready != shown:
                shown = ready
                self._observe(events.Waiting(ready, rounds.goal - accepted))
            return False

        self._pump(enough)

    def _invite(self, current: OpenRound) -> None:
        state, rounds = current.state, self._config.rounds
        needed = rounds.goal - state.count(Part.ACCEPTED)
        wanted = math.ceil(needed * rounds.over_selection)
        pool = self._invitations.pool(current)
        chosen = self._invitations.choose(pool, wanted, number=state.number, attempt=state.attempt)
        now = self._clock()
        current.invited_at = now if current.invited_at is None else current.invited_at
        state.deadline_at = now + deadline_seconds(rounds, self._history.durations, state.attempt)
        newest = current.patches[-1].blob if current.patches else current.parameters
        self._blobs.expect(newest, audience=len(chosen))
        current.collection.invite(chosen)
        for name in chosen:
            state.invite(name)
            current.invited[name] = now
            self._post.send(name, self._invitations.plan(current, name))
        self._observe(events.RoundStarted(state.number, state.attempt, len(chosen)))

    def _close_round(self, current: OpenRound) -> None:
        state, collection = current.state, current.collection
        self._dismiss(current)
        parameters, server_state = self._strategy.finish(collection.partial, self._parameters, self._server_state)
        parameters[self._personal] = self._parameters[self._personal]
        due = state.number % self._config.evaluation.every == 0
        evaluation = (
            self._evaluate_after(state.number, parameters) if due or state.number >= self._config.rounds.total else None
        )
        now = self._clock()
        bytes_up, bytes_down = self._traffic()
        record = round_record(
            current,
            parameters,
            seconds=now - (now if current.invited_at is None else current.invited_at),
            loss=evaluation.loss if evaluation else None,
            accuracy=evaluation.accuracy if evaluation else None,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
        )
        self._save_clients()
        rows = client_rows(current)
        self._history.add(rows)
        self._history.durations.extend(current.durations.values())
        self._directory.close_round(
            record,
            parameters,
            rows,
            server_state=server_state,
            strategy=described(self._strategy),
        )
        collection.close()
        self._parameters, self._server_state = parameters, server_state
        self._round_number = state.number
        self._intake.current = None
        self._intake.forget_uploads()
        self._observe(events.RoundEnded(record))

    def _dismiss(self, current: OpenRound) -> None:
        """Whoever still trains for the round may stop."""
        state = current.state
        self._post.broadcast(RoundClosed(run=self._directory.run, round=state.number, nonce=state.nonce))
        for blob in current.blobs:
            self._blobs.remove(blob)

    # --- around the rounds ---------------------------------------------------------------------------

    def _evaluate_after(self, number: int, parameters: Vector) -> Evaluation | None:
        if self._evaluate is None:
            return None
        evaluation = self._evaluate(parameters)
        self._observe(events.Evaluated(number, evaluation.loss, evaluation.accuracy))
        return evaluation

    def _traffic(self) -> tuple[int, int]:
        """(bytes from clients, bytes that clients say they received) since this was asked last."""
        up = down = 0
        for record in self._roster.all():
            received = record.resources.bytes_received
            # A client counts from its own start: after ours, the first number says nothing about this round.
            before = received if self._resumed and not record.counted_down else record.counted_down
            up += record.bytes_up - record.counted_up
            down += max(0, received - before)
            record.counted_up, record.counted_down = record.bytes_up, received
        return up, down

    def _evaluate_by_clients(self) -> None:
        self._ask_clients_for_reports(self._parameters)
        if not self._intake.reports:
            return
        before = self._directory.evaluations[-1] if self._directory.evaluations else None
        evaluation = evaluation_of(self._round_number, self._intake.reports, before)
        self._directory.add_evaluation(evaluation)
        self._observe(events.ClientsEvaluated(evaluation))

    def _ask_clients_for_reports(self, parameters: Vector) -> None:
        """Lets every client evaluate parameters on its own validation data, into `Intake.reports`."""
        clients = self._roster.eligible()
        self._intake.reports.clear()
        if not clients:
            return
        deadline = self._clock() + REPORT_SECONDS
        reference = self._blobs.add(encode(parameters, WHOLE))
        self._blobs.expect(reference, audience=len(clients))
        plan = self._intake.evaluation_plan = self._invitations.evaluation_plan(
            self._round_number, parameters, reference, REPORT_SECONDS
        )
        for name in clients:
            self._post.send(name, plan)

        def complete() -> bool:
            reports = self._intake.reports
            waiting = [name for name in clients if name not in reports and self._roster[name].online]
            return not waiting or self._clock() >= deadline

        self._pump(complete)
        self._intake.evaluation_plan = None
        self._blobs.remove(reference)

    def _summarize(self, status: str, reason: str) -> Summary:
        self._save_clients()
        summary = summarize(
            self._config.federation,
            self._directory.records,
            self._roster.all(),
            self._intake.reports,
            status=status,
            reason=reason,
            seconds=self._clock() - self._started,
            best_round=self._directory.best_round(),
        )
        self._directory.write_summary(summary)
        self._observe(events.RunEnded(summary))
        return summary

    def _save_clients(self) -> None:
        self._directory.save_clients(
            [(record.name, record.public_key, record.last_accepted) for record in self._roster.all()]
        )
        self._clients_saved = len(self._roster)

    # --- events --------------------------------------------------------------------------------------

    def _pump(self, done: Callable[[], bool]) -> None:
        """Handles events until `done`."""
        while True:
            now = self._clock()
            self._request()
            self._blobs.tick(now)
            self._intake.ask_for_stalled()
            if done():
                return
            event = self._transport.receive(self._patience(now))
            for _ in range(BATCH_EVENTS):
                match event:
                    case None:
                        break
                    case Received():
                        self._intake.handle(event)
                    case Disconnected():
                        logger.warning("lost the broker: %s; reconnecting", event.reason)
                    case Connected():
                        self._post.announce(*self._status)
                event = self._transport.receive(0)
            if len(self._roster) != self._clients_saved:
                # A name belongs to its first key, also after a crash.
                self._save_clients()
            self._intake.send_verdicts()

    def _patience(self, now: float) -> float:
        """Seconds until something is due by itself."""
        due = [now + POLL_SECONDS]
        if (blob := self._blobs.next_due()) is not None:
            due.append(blob)
        if (current := self._intake.current) and current.state.deadline_at > now:
            due.append(current.state.deadline_at)
        return max(0.001, min(due) - now)


def _said(current: OpenRound) -> str:
    """What clients gave as reasons, for an error message."""
    said = [f"{client}: {reason}" for client, reason in sorted(current.reasons.items())]
    return f" ({'; '.join(said[:3])}{'; …' if len(said) > 3 else ''})" if said else ""

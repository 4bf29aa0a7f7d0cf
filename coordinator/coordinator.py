"""The coordinator: one thread that owns all state and takes events out of the transport's queue."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from edgetrain.coordinator import events
from edgetrain.coordinator.clients.spread import evaluation_of
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import RoundFailed, RunError, StopRequested
from edgetrain.coordinator.evaluation import Evaluation
from edgetrain.coordinator.interruption import Interruption
from edgetrain.coordinator.parts import assemble, obeyed_request
from edgetrain.coordinator.privacy.budget import check_bundle, open_budget
from edgetrain.coordinator.privacy.lottery import Lottery
from edgetrain.coordinator.reports import client_rows, round_record, summarize
from edgetrain.coordinator.rounds.deadlines import deadline_seconds
from edgetrain.coordinator.rounds.invitations import checked_strategy
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Outcome, Part
from edgetrain.coordinator.run.records import Summary
from edgetrain.coordinator.run.requests import read_request, write_request
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.stopping import metric_series, stop_reason
from edgetrain.coordinator.strategies import Strategy, described
from edgetrain.coordinator.traffic import count_traffic
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.groups import elements_of
from edgetrain.protocol.messages import RoundClosed
from edgetrain.protocol.transport import Transport
from edgetrain.protocol.vectors import Vector

logger = logging.getLogger(__name__)

# A failed round is tried again after a pause that doubles from one second up to this.
MAX_RETRY_SECONDS = 30.0


class Coordinator:
    """Runs a federation from the first client to the summary.

    Args:
        config: the settings.
        bundle: to train.
        transport: connected.
        directory: where the run lives; if it holds closed rounds, the run goes on after them.
        evaluate: loss and accuracy of parameters on held-out data, or None.
        observe: is told what happens, in the coordinator's thread.
        reload_broker: called when enrolments have changed.
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
        reload_broker: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._bundle = bundle
        self._transport = transport
        self._directory = directory
        self._evaluate = evaluate
        self._observe = observe
        self._clock = clock
        self._strategy = self._make_strategy()
        self._server_state = directory.load_server_state()
        shown = config.rounds.least if config.secure_aggregation.enabled else 0
        self._lottery = Lottery.of(self._strategy.private, least=shown)
        # What the devices keep to themselves stays as it was exported here.
        self._personal = elements_of(bundle.manifest, config.personal)
        self._round_number, self._parameters = directory.load_parameters(bundle.initial_parameters())
        self._resumed = self._round_number > 0
        self._interruption = Interruption()
        parts = assemble(
            config,
            bundle=bundle,
            transport=transport,
            directory=directory,
            strategy=self._strategy,
            observe=observe,
            reload_broker=reload_broker,
            interruption=self._interruption,
            clock=clock,
        )
        self._topics, self._blobs, self._post = parts.topics, parts.blobs, parts.post
        self._chronicle = parts.chronicle
        self._history, self._clients = parts.history, parts.clients
        self._agenda, self._invitations, self._pump = parts.agenda, parts.invitations, parts.pump
        self._uploads = parts.uploads
        self._signing = parts.signing
        self._opening, self._gathering, self._reports = parts.opening, parts.gathering, parts.reports
        check_bundle(config, bundle.manifest)
        # Last: it locks a file until `run` ends.
        self._budget = open_budget(config, self._strategy, directory.records)
        self._started = clock()

    def _make_strategy(self) -> Strategy:
        return checked_strategy(self._config)

    def run(self) -> Summary:
        """Runs until a stop condition holds.

        Raises:
            RoundFailed: too few clients, too often.
            RunError: the run directory cannot be written.
            KeyboardInterrupt: after the run was left so that it can go on later.
        """
        with self._interruption:
            return self._run()

    def _run(self) -> Summary:
        try:
            self._open()
            reason = self._run_rounds()
            if self._config.evaluation.by_clients and self._round_number:
                self._reports.ask(self._round_number, self._parameters)
        except StopRequested:
            self._chronicle.command("stop")
            reason = "stopped on request; the same command goes on where it stopped"
            self._pump.announce("ended", reason)
            return self._summarize("stopped", reason)
        except KeyboardInterrupt:
            self._chronicle.command("interrupt")
            self._pump.announce("paused", "the coordinator was interrupted")
            self._summarize("interrupted", "interrupted; the same command goes on where it stopped")
            raise
        except RoundFailed as error:
            self._pump.announce("ended", str(error))
            self._summarize("failed", str(error))
            raise
        except RunError:
            # A full disk, most likely. Whoever is told where is the coordinator's log.
            self._pump.announce("paused", "the coordinator cannot write to its disk")
            raise
        finally:
            if self._agenda.current:
                self._agenda.current.collection.close()
            if self._budget:
                self._budget.close()
            if self._uploads.foreman:
                self._uploads.foreman.close()
            self._opening.close()
            self._signing.close()
            self._directory.settle()
        self._pump.announce("ended", reason)
        return self._summarize("completed", reason)

    def _open(self) -> None:
        if read_request(self._directory.path) == "stop":
            # It was obeyed by the process before.
            write_request(self._directory.path, "run")
        for entry in self._bundle.manifest.files():
            self._blobs.add(self._bundle.map(entry))
        if self._uploads.foreman:
            self._uploads.foreman.start()
        # The announcement follows when the transport says that it is connected.
        for kind in ("message",) if self._uploads.foreman else ("message", "blob"):
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
            if self._budget and (refusal := self._budget.refusal()):
                return f"round {self._round_number + 1} was refused before it started: {refusal}"
            self._run_round(self._round_number + 1)
            every = self._config.evaluation.by_clients_every
            if every and self._round_number % every == 0:
                self._evaluate_by_clients()

    def _pause_if_asked(self) -> None:
        if obeyed_request(self._directory) != "pause":
            return
        self._chronicle.command("pause")
        self._pump.announce("paused", "paused on request")
        self._observe(events.Paused())
        self._pump.until(lambda: obeyed_request(self._directory) != "pause")
        self._chronicle.command("resume")
        self._pump.announce("open")
        self._observe(events.Resumed())

    # --- one round -----------------------------------------------------------------------------------

    def _run_round(self, number: int) -> None:
        rounds = self._config.rounds
        current = self._agenda.current = self._open_round(number)
        state = current.state
        failures = 0
        while True:
            if state.count(Part.ACCEPTED) < state.goal:
                self._gathering.wait(current)
                self._invite(current)
                self._pump.until(lambda: state.outcome(self._clock()) is not Outcome.OPEN)
            if state.outcome(self._clock()) is Outcome.CLOSED:
                break
            failures += 1
            message = (
                f"round {number}, attempt {state.attempt}: {state.count(Part.ACCEPTED)} updates "
                f"of at least {rounds.least}"
            )
            logger.warning("%s", message)
            self._chronicle.abandoned(number, state.attempt, f"{message}{current.said()}")
            if rounds.max_failures and failures >= rounds.max_failures:
                raise RoundFailed(
                    f"{message}, after {failures} attempts{current.said()}. Lower rounds.minimum, raise "
                    "rounds.deadline_seconds, or look at the clients' logs; the run can go on from here."
                )
            state.attempt += 1
            retry_at = self._clock() + min(2.0 ** (failures - 1), MAX_RETRY_SECONDS)
            self._pump.until(lambda at=retry_at: self._clock() >= at or state.count(Part.ACCEPTED) >= state.goal)  # type: ignore[misc]
        self._close_round(current)

    def _open_round(self, number: int) -> OpenRound:
        """Opens the round, or takes up what an earlier process has left of it."""
        current = self._opening.open(number, self._parameters, self._server_state)
        if self._uploads.foreman:
            self._uploads.foreman.open_round(current, len(self._parameters), self._server_state)
        if self._lottery:
            self._lottery.resume(current)
        return current

    def _invite(self, current: OpenRound) -> None:
        state, rounds = current.state, self._config.rounds
        needed = rounds.goal - state.count(Part.ACCEPTED)
        wanted = math.ceil(needed * rounds.over_selection)
        pool = self._invitations.pool(current)
        if self._lottery:
            chosen = self._lottery.invite(current, pool)
        else:
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
            self._send_plan(current, name)
        self._observe(events.RoundStarted(state.number, state.attempt, len(chosen)))

    def _send_plan(self, current: OpenRound, client: str) -> None:
        plan = self._invitations.plan(current, client)
        self._chronicle.invited(client, plan, current.state.attempt)
        self._post.send(client, plan)

    def _close_round(self, current: OpenRound) -> None:
        state, collection = current.state, current.collection
        if foreman := self._uploads.foreman:
            foreman.ask_for_shares()
            self._pump.until(lambda: foreman.has_shares)
            foreman.add_shares()
        self._dismiss(current)
        epsilon = self._pay(current)
        parameters, server_state = self._strategy.finish(collection.partial, self._parameters, self._server_state)
        parameters[self._personal] = self._parameters[self._personal]
        self._directory.begin_parameters(state.number, parameters)
        if state.number < self._config.rounds.total:
            # While this round is evaluated and written.
            self._opening.prepare(state.number + 1, parameters)
        due = state.number % self._config.evaluation.every == 0
        evaluation = (
            self._evaluate_after(state.number, parameters) if due or state.number >= self._config.rounds.total else None
        )
        now = self._clock()
        bytes_up, bytes_down = count_traffic(self._clients.roster, resumed=self._resumed)
        record = round_record(
            current,
            parameters,
            seconds=now - (now if current.invited_at is None else current.invited_at),
            loss=evaluation.loss if evaluation else None,
            accuracy=evaluation.accuracy if evaluation else None,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            epsilon=epsilon,
        )
        rows = client_rows(current)
        self._history.add(rows)
        self._history.durations.extend(current.durations.values())
        self._chronicle.aggregated(record)
        # Before it is deleted: that takes longer while it is open.
        collection.close()
        clients = self._clients.changed()
        self._directory.close_round(
            record,
            parameters,
            rows,
            server_state=server_state,
            strategy=described(self._strategy),
            clients=clients,
            tidy_later=True,
        )
        self._clients.note_saved(clients)
        self._parameters, self._server_state = parameters, server_state
        self._round_number = state.number
        self._agenda.current = None
        self._uploads.forget(current, asynchronous=self._strategy.asynchronous)
        self._chronicle.note_checkpoint()
        self._observe(events.RoundEnded(record))

    def _pay(self, current: OpenRound) -> float | None:
        """Pays for a round out of the privacy budget, if there is one, before its noisy sum is looked at."""
        if self._budget is None:
            return None
        epsilon = self._budget.charge(sorted(current.contributors))
        self._chronicle.privacy_spent(
            current.state.number, epsilon=epsilon, delta=self._budget.delta, mechanism=self._budget.mechanism
        )
        return epsilon

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

    def _evaluate_by_clients(self) -> None:
        self._reports.ask(self._round_number, self._parameters)
        if not self._agenda.reports:
            return
        before = self._directory.evaluations[-1] if self._directory.evaluations else None
        evaluation = evaluation_of(self._round_number, self._agenda.reports, before)
        self._directory.add_evaluation(evaluation)
        self._observe(events.ClientsEvaluated(evaluation))

    def _summarize(self, status: str, reason: str) -> Summary:
        self._clients.save()
        self._chronicle.ended(status, reason)
        summary = summarize(
            self._config.federation,
            self._directory.records,
            self._clients.roster.all(),
            self._agenda.reports,
            status=status,
            reason=reason,
            seconds=self._clock() - self._started,
            best_round=self._directory.best_round(),
            epsilon=self._budget.epsilon if self._budget else None,
            delta=self._budget.delta if self._budget else None,
        )
        self._directory.write_summary(summary)
        self._observe(events.RunEnded(summary))
        return summary

"""The client: joins a federation over MQTT, trains when it is asked to, sends compressed updates.

One thread owns all state. It is sequential code (fetch, train, send, wait for the verdict) that looks into
its mailbox whenever it waits or finishes a micro-batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from edgetrain import __version__
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.control_variate import ControlVariate, control_change
from edgetrain.edge_client.data import Dataset, load_dataset
from edgetrain.edge_client.device import device_info, device_state, is_news, peak_memory_mb
from edgetrain.edge_client.error_feedback import ErrorFeedback
from edgetrain.edge_client.errors import StateError, TrainingError
from edgetrain.edge_client.frozen_part import skip_frozen_part
from edgetrain.edge_client.held_parameters import HeldParameters
from edgetrain.edge_client.installation import Fetch, install_bundle
from edgetrain.edge_client.mailbox import REMEMBERED_PLANS, Abandoned, Mailbox, RunOver
from edgetrain.edge_client.personal import PersonalParameters
from edgetrain.edge_client.policy import Policy
from edgetrain.edge_client.privacy_budget import DeviceBudget
from edgetrain.edge_client.private_steps import check_bundle
from edgetrain.edge_client.runtimes import available_runtimes
from edgetrain.edge_client.runtimes.base import Session, Vector
from edgetrain.edge_client.secure_aggregation import SecureParticipation
from edgetrain.edge_client.state import ClientState
from edgetrain.edge_client.trainer import evaluate, train
from edgetrain.protocol import BlobError, CodecError
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.codecs import Limits, decode, encode, supported_stages
from edgetrain.protocol.errors import ConfigError, SecureAggregationError
from edgetrain.protocol.groups import elements_of
from edgetrain.protocol.messages import (
    Decline,
    DeviceState,
    Goodbye,
    Hello,
    Offer,
    Plan,
    Ready,
    Report,
    Resources,
    encode_message,
    split_update,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.signing import seal
from edgetrain.protocol.transport import Transport

logger = logging.getLogger(__name__)


def connection_will(config: ClientConfig, state: ClientState, connection: bytes) -> tuple[str, bytes]:
    """The last will of a connection: (topic, payload), a signed Goodbye."""
    goodbye = Goodbye(reason="connection lost", connection=connection)
    topic = Topics(config.federation).from_client(config.name, "message")
    return topic, seal(state.key, config.federation, config.name, encode_message(goodbye))


def new_connection() -> bytes:
    """Random id of a connection."""
    return os.urandom(16)


class ComeBack(Exception):  # no error
    """The coordinator will not need this client for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not needed for {seconds:.0f} s")
        self.seconds = seconds


class Client:
    """One client.

    Args:
        config: the settings.
        state: its directory.
        transport: connected, with the will of `connection_will`.
        connection: 16 random bytes, the same as in the will.
        run: that this client took part in before it was sent away, if it was.
        clock: monotonic seconds.
        policy: whether this device trains now; None for that of the settings.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        state: ClientState,
        transport: Transport,
        connection: bytes,
        run: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy | None = None,
    ) -> None:
        self._config = config
        self._state = state
        self._transport = transport
        self._connection = connection
        # The device's state as the coordinator knows it.
        self._told = DeviceState()
        self._earlier_run = run
        self._clock = clock
        self._policy = Policy(config.policy, clock=clock) if policy is None else policy
        self._mail = Mailbox(
            config.name,
            Topics(config.federation),
            state=state,
            transport=transport,
            connection=connection,
            coordinator_key=config.coordinator_key,
            download_rate=config.broker.download_kbit * 125,
            clock=clock,
        )
        self._mail.introduce = self._introduce
        self._secure = SecureParticipation(config, state=state, mail=self._mail)
        self._budget = DeviceBudget(state.path / "privacy.json", config.name, config.privacy)
        # Training plans that are finished, with the reason why not again; "" if the update was accepted.
        self._done: dict[bytes, str] = {}
        self._bundle: bytes | None = None
        # Set by `_join`, in this order.
        self._session: Session | None = None
        self._training_data: Dataset | None = None
        self._validation_data: Dataset | None = None
        self._held: HeldParameters | None = None
        self._feedback: ErrorFeedback | None = None
        # Where plans ask for them.
        self._control: ControlVariate | None = None
        self._personal: PersonalParameters | None = None
        self._personal_patterns: tuple[str, ...] = ()

    def run(self) -> float | None:
        """Takes part until the run ends (or for ever, see `exit_when_done`).

        Returns:
            None; or, if the coordinator will not need this client for a while, in how many seconds to run a new
            one on a new connection.

        Raises:
            RefusedError: the coordinator will not have this client.
            ClientError, BundleError, BlobError: this device cannot take part; the message says why.
            KeyboardInterrupt: after saying goodbye.
        """
        self._mail.open()
        logger.info("client %s waits for federation %s", self._config.name, self._config.federation)
        reason = "stopped by an error"
        try:
            while not self._finished():
                try:
                    self._join()
                    self._take_part()
                except RunOver as over:
                    logger.info("%s", over)
            reason = "the run has ended"
        except ComeBack as later:
            reason = f"comes back in {later.seconds:.0f} s"
            return later.seconds
        except KeyboardInterrupt:
            reason = "interrupted"
            raise
        finally:
            self._budget.close()
            self._mail.send(Goodbye(reason=reason, connection=self._connection))
            self._transport.close()
        return None

    def _finished(self) -> bool:
        """Whether the run that this client took part in has ended."""
        announce = self._mail.announce
        return (
            self._config.exit_when_done
            and announce is not None
            and announce.status == "ended"
            and announce.run in {self._mail.joined, self._earlier_run}
        )

    @property
    def joined(self) -> bytes | None:
        """The run that it took part in last."""
        return self._mail.joined

    # --- joining -------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Hello, Welcome, the bundle, Ready."""
        mail = self._mail
        mail.wait(lambda: (mail.announce is not None and mail.announce.status == "open") or self._finished())
        announce = mail.announce
        assert announce is not None, "just waited for"
        if announce.status == "ended":
            raise RunOver("the run ended meanwhile")
        if mail.joined != announce.run:
            self._done.clear()
        mail.joined, mail.welcomed, mail.plan = announce.run, False, None
        self._send_hello()
        mail.wait(lambda: mail.welcomed, repeat=self._send_hello)
        if self._bundle != announce.bundle.digest:
            self._bundle = self._feedback = self._personal = None
            self._personal_patterns = ()
            session = install_bundle(
                announce.bundle, fetch=mail.fetch, fetch_to=mail.fetch_to, state=self._state, config=self._config
            )
            dataset = load_dataset(self._config.data, session.manifest)
            training, validation = split_validation(dataset, self._config.validation_fraction, self._config.name)
            session, self._training_data, self._validation_data = skip_frozen_part(
                session,
                training,
                validation,
                bundle=announce.bundle.digest,
                directory=self._state.path,
                config=self._config,
            )
            self._held = HeldParameters(session.manifest.num_parameters)
            self._session, self._bundle = session, announce.bundle.digest
        if self._feedback is None or self._feedback.run != announce.run:
            self._take_up_feedback()
        self._send_ready()

    def _take_up_feedback(self) -> None:
        """What the disk says of the residual and of a pending update."""
        assert self._session, "joined"
        assert self._bundle, "joined"
        assert self._mail.joined, "joined"
        self._feedback = self._state.error_feedback(
            bundle=self._bundle, run=self._mail.joined, num_parameters=self._session.manifest.num_parameters
        )
        self._control = None

    def _introduce(self) -> None:
        """To a coordinator, or over a broker, that may not know us."""
        self._send_hello()
        if self._feedback:
            self._send_ready()
        if self._feedback and self._feedback.offer and self._mail.upload:
            self._mail.send(self._feedback.offer)

    def _send_hello(self) -> None:
        self._mail.send(
            Hello(
                public_key=self._state.key.public_key,
                connection=self._connection,
                edgetrain=__version__,
                runtimes=tuple(available_runtimes()),
                stages=tuple(sorted(supported_stages())),
                device=device_info(),
            )
        )

    def _tell_news(self) -> None:
        if is_news(self._told, device_state()):
            self._send_ready()

    def _send_ready(self) -> None:
        assert self._session, "joined"
        assert self._bundle, "joined"
        assert self._training_data, "joined"
        self._told = device_state()
        self._mail.send(
            Ready(
                bundle=self._bundle,
                runtime=self._session.runtime,
                num_examples=len(self._training_data),
                state=self._told,
                connection=self._connection,
            )
        )

    # --- rounds --------------------------------------------------------------------------------------

    def _take_part(self) -> None:
        mail = self._mail
        self._settle_pending(resumed=True)
        while True:
            # Whoever was not invited because of its battery or its heat says when that is over.
            mail.wait(lambda: mail.plan is not None, repeat=self._tell_news)
            plan, mail.plan = mail.plan, None
            assert plan is not None, "just waited for"
            if plan.nonce in mail.closed:
                continue
            if (reason := self._done.get(plan.nonce)) is not None:
                if reason:
                    # The round is tried again: silence would hold it up until its deadline.
                    self._decline(plan, reason)
                continue
            if plan.bundle != self._bundle:
                self._decline(plan, "has another bundle")
                continue
            try:
                # What could not be settled because the disk was full.
                self._settle_pending()
                if reason := self._policy.objection():
                    logger.warning("round %d: declined: %s", plan.round, reason)
                    self._decline(plan, reason)
                elif plan.task == "train":
                    self._train_round(plan)
                else:
                    self._evaluate_round(plan)
            except Abandoned:
                logger.info("round %d: over before its parameters came", plan.round)
            except StateError as error:
                # A full or a read-only disk: what is on it counts, and somebody may make room.
                logger.error("round %d: declined: %s", plan.round, error)  # noqa: TRY400 - it says what and where
                self._mail.end_upload()
                self._take_up_feedback()
                self._decline(plan, str(error)[:1000])
            except (
                TrainingError,
                CodecError,
                BlobError,
                ConfigError,
                PrivacyError,
                SecureAggregationError,
            ) as error:
                logger.warning("round %d: %s", plan.round, error)
                self._finish(plan.nonce, str(error)[:1000])
                self._decline(plan, str(error)[:1000])

    def _finish(self, nonce: bytes, reason: str = "") -> None:
        self._done[nonce] = reason
        if len(self._done) > REMEMBERED_PLANS:
            del self._done[next(iter(self._done))]

    def _train_round(self, plan: Plan) -> None:
        assert self._session, "joined"
        assert self._held, "joined"
        assert self._feedback, "joined"
        assert self._training_data, "joined"
        self._secure.check(plan)
        if plan.secure and self._feedback.trained_on == plan.vector:
            # An attempt at this round was given up: what was learnt waits in the residual.
            self._aggregate_securely(plan)
            return
        check_bundle(self._session, plan.training)
        self._budget.check(plan.training, len(self._training_data))
        parameters = self._personalized(plan, self._held.advance(plan, self._fetch_for(plan)))
        server_control = self._server_control(plan)
        started = self._clock()
        result = train(
            self._session,
            parameters,
            self._training_data,
            plan.training,
            seed=_mix_seed(plan.seed, self._config.name, plan.round),
            gradient_correction=None if server_control is None else server_control - self._own_control(plan).vector,
            may_continue=lambda: self._may_continue(plan),
        )
        if result.stopped is not None:
            logger.info("round %d: training stopped: %s", plan.round, result.stopped)
            if not self._is_over(plan):
                self._decline(plan, result.stopped)
            return
        self._budget.charge(plan.training, len(self._training_data))
        if plan.secure:
            if self._personal:
                self._personal.keep(result.parameters)
            self._feedback.hold(self._shared(result.parameters - parameters), trained_on=plan.vector)
            self._aggregate_securely(plan, self._clock() - started)
            return
        offsets = tuple(entry.offset for entry in self._session.manifest.parameters)
        update = self._feedback.prepare(
            self._shared(result.parameters - parameters),
            plan.codec,
            seed=_mix_seed(plan.seed, self._config.name + "/codec", plan.round),
            offsets=offsets,
            max_norm=plan.training.max_delta_norm,
        )
        control = b""
        if server_control is not None:
            change = control_change(server_control, parameters, result.parameters, plan.training, result.steps)
            control = encode(
                self._shared(change),
                plan.codec,
                seed=_mix_seed(plan.seed, self._config.name + "/control", plan.round),
                offsets=offsets,
            )
        if self._personal:
            self._personal.keep(result.parameters)
        self._feedback.commit(
            Offer(
                run=plan.run,
                round=plan.round,
                nonce=plan.nonce,
                update=blob_ref(update + control),
                num_examples=result.num_examples,
                steps=result.steps,
                control_bytes=len(control),
                unclipped=self._feedback.unclipped,
                metrics=self._sayable(result.loss, result.metrics),
                resources=self._resources(self._clock() - started),
                state=device_state(),
            ),
            control,
        )
        self._settle_pending()

    def _aggregate_securely(self, plan: Plan, seconds: float = 0.0) -> None:
        """Takes part with what is in the residual, after so many seconds of training."""
        assert self._feedback, "joined"
        assert self._training_data, "joined"
        masked = self._secure.take_part(
            plan,
            self._feedback,
            weight=len(self._training_data),
            seed=_mix_seed(plan.seed, self._config.name + "/codec", plan.round),
            resources=lambda: self._resources(seconds),
            fetch=self._fetch_for(plan),
            is_over=lambda: self._is_over(plan),
        )
        if masked:
            self._settle_pending()

    def _evaluate_round(self, plan: Plan) -> None:
        assert self._session, "joined"
        assert self._held, "joined"
        data = self._validation_data or self._training_data
        assert data, "joined"
        parameters = self._personalized(plan, self._held.advance(plan, self._fetch_for(plan)))
        started = self._clock()
        summary = evaluate(self._session, parameters, data)
        self._mail.send(
            Report(
                run=plan.run,
                round=plan.round,
                nonce=plan.nonce,
                num_examples=summary.num_examples,
                metrics=self._sayable(summary.loss, summary.metrics),
                resources=self._resources(self._clock() - started),
            )
        )

    def _settle_pending(self, *, resumed: bool = False) -> None:
        """Sends the pending update until the coordinator says what became of it.

        Args:
            resumed: the coordinator may have a part of it already, from an earlier process or connection.
        """
        feedback, mail = self._feedback, self._mail
        if feedback is None or feedback.offer is None:
            return
        offer = feedback.offer
        digest = offer.update.digest
        mail.verdicts.clear()
        mail.upload = (offer.update, feedback.update)
        mail.send(offer)
        if resumed:
            mail.resume_upload()
        else:
            mail.send_upload()
        over: RunOver | None = None
        try:
            mail.wait(lambda: digest in mail.verdicts, repeat=lambda: mail.send(offer))
        except RunOver as error:
            # It may have been accepted just before the end.
            over = error
            if digest not in mail.verdicts or not mail.verdicts[digest].accepted:
                raise
        mail.end_upload()
        verdict = mail.verdicts[digest]
        if verdict.accepted and offer.control_bytes:
            _, change = split_update(offer, feedback.update)
            control = self._own_control(offer)
            control.apply(digest, decode(change, Limits(max_parameters=len(control.vector))))
        feedback.settle(accepted=verdict.accepted)
        why_not_again = "" if verdict.accepted else f"its update was refused: {verdict.reason}"
        self._finish(offer.nonce, why_not_again[:1000])
        if verdict.accepted:
            logger.info("round %d: update of %d bytes accepted", offer.round, offer.update.size)
        else:
            logger.warning("round %d: update refused: %s", offer.round, verdict.reason)
        if over:
            raise over
        if verdict.accepted and verdict.come_back_seconds and self._config.leave_when_idle:
            raise ComeBack(verdict.come_back_seconds)

    def _fetch_for(self, plan: Plan) -> Fetch:
        """Fetches blobs as long as the plan is not over."""
        return partial(self._mail.fetch, abandon=lambda: self._is_over(plan))

    def _is_over(self, plan: Plan) -> bool:
        newer = self._mail.plan
        return plan.nonce in self._mail.closed or (newer is not None and _sources(newer) != _sources(plan))

    # --- what stays here -----------------------------------------------------------------------------

    def _personalized(self, plan: Plan, parameters: Vector) -> Vector:
        """The round's parameters with this device's own, if the plan says that some stay here."""
        assert self._session, "joined"
        assert self._bundle, "joined"
        if plan.personal != self._personal_patterns:
            self._personal = None
            if plan.personal:
                mask = elements_of(self._session.manifest, plan.personal)
                self._personal = self._state.personal_parameters(bundle=self._bundle, patterns=plan.personal, mask=mask)
            self._personal_patterns = plan.personal
        return self._personal.overlay(parameters) if self._personal else parameters

    def _shared(self, change: Vector) -> Vector:
        """The part of a change that may leave the device."""
        if self._personal:
            change[self._personal.mask] = 0
        return change

    def _server_control(self, plan: Plan) -> Vector | None:
        assert self._session, "joined"
        length = self._session.manifest.num_parameters
        if plan.control is None:
            return None
        data = self._fetch_for(plan)(plan.control, limit=8 * length + 4096)
        control = decode(data, Limits(max_parameters=length)).dense()
        if len(control) != length:
            raise CodecError("the coordinator's control variate is not of the bundle's length")
        return control

    def _own_control(self, of: Plan | Offer) -> ControlVariate:
        assert self._session, "joined"
        if self._control is None or self._control.run != of.run:
            self._control = self._state.control_variate(
                run=of.run, num_parameters=self._session.manifest.num_parameters
            )
        return self._control

    # --- around the rounds ---------------------------------------------------------------------------

    def _may_continue(self, plan: Plan) -> bool | str:
        self._mail.pump(0)
        if plan.nonce in self._mail.closed:
            return "the round has closed"
        return self._policy.objection() or True

    def _sayable(self, loss: float, metrics: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
        """The metrics that may leave the device."""
        return {} if self._budget.withholds_metrics else _scalars(loss, metrics)

    def _decline(self, plan: Plan, reason: str) -> None:
        self._mail.send(Decline(round=plan.round, nonce=plan.nonce, reason=reason))

    def _resources(self, seconds: float) -> Resources:
        return Resources(
            seconds=round(seconds, 4),
            peak_memory_mb=peak_memory_mb(),
            bytes_sent=self._transport.bytes_sent,
            bytes_received=self._transport.bytes_received,
        )


def _sources(plan: Plan) -> tuple[object, ...]:
    """What is fetched for a plan: a coordinator that was started again may encode it in other bytes."""
    return plan.nonce, plan.vector, plan.parameters, plan.patches, plan.control


def split_validation(dataset: Dataset, fraction: float, name: str) -> tuple[Dataset, Dataset | None]:
    """(training, validation) parts, chosen by the client's name, so that every start chooses the same."""
    count = math.floor(len(dataset) * fraction)
    if count == 0:
        return dataset, None
    order = np.random.Generator(np.random.PCG64(_mix_seed(0, name, 0))).permutation(len(dataset))
    return dataset.subset(np.sort(order[count:])), dataset.subset(np.sort(order[:count]))


def _mix_seed(seed: int, name: str, round_number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _scalars(loss: float, metrics: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
    """Loss and scalar metrics, finite ones only; the mean of `correct` is the accuracy."""
    values = {"loss": loss}
    for name, value in metrics.items():
        if value.ndim == 0:
            values["accuracy" if name == "correct" else name] = float(value)
    return {name: value for name, value in values.items() if math.isfinite(value)}

"""A client's rounds in one run: train, evaluate, send the update until it is known what became of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.control_variate import ControlVariate, control_change
from edgetrain.edge_client.durable.error_feedback import ErrorFeedback
from edgetrain.edge_client.durable.installation import Fetch
from edgetrain.edge_client.host.device import device_state, peak_memory_mb
from edgetrain.edge_client.host.policy import Policy
from edgetrain.edge_client.mailbox import REMEMBERED_PLANS, Mailbox, RunOver
from edgetrain.edge_client.privacy.sample_budget import DeviceBudget
from edgetrain.edge_client.privacy.secure_aggregation import SecureParticipation
from edgetrain.edge_client.training.private_steps import check_bundle
from edgetrain.edge_client.training.seeds import mix_seed
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.edge_client.workplace import Workplace
from edgetrain.protocol import CodecError
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.codecs import Limits, decode, encode
from edgetrain.protocol.messages import Decline, Offer, Plan, Report, Resources, split_update
from edgetrain.protocol.transport import Transport
from edgetrain.protocol.vectors import Vector

logger = logging.getLogger(__name__)


class ComeBack(Exception):  # no error
    """The coordinator will not need this client for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not needed for {seconds:.0f} s")
        self.seconds = seconds


class Rounds:
    """What this client does in one run.

    Args:
        run: id of the run.
        workplace: the run's bundle on this device.
        config: the settings.
        mail: to and from the coordinator.
        transport: counts bytes.
        secure: takes part in secure aggregation.
        budget: of privacy, on this device.
        policy: whether this device trains now.
        clock: monotonic seconds.

    Raises:
        StateError: what is on disk of this run cannot be read.
    """

    def __init__(
        self,
        run: bytes,
        workplace: Workplace,
        *,
        config: ClientConfig,
        mail: Mailbox,
        transport: Transport,
        secure: SecureParticipation,
        budget: DeviceBudget,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self.run = run
        self.workplace = workplace
        self._config = config
        self._mail = mail
        self._transport = transport
        self._secure = secure
        self._budget = budget
        self._policy = policy
        self._clock = clock
        # Training plans that are finished, with the reason why not again; "" if the update was accepted.
        self.done: dict[bytes, str] = {}
        # Where plans ask for it.
        self._control: ControlVariate | None = None
        self._feedback = self._load_feedback()

    @property
    def pending(self) -> Offer | None:
        """The update whose verdict has not come."""
        return self._feedback.offer

    def take_up(self) -> None:
        """What the disk says of the residual and of a pending update, after something went wrong with either."""
        self._feedback = self._load_feedback()
        self._control = None

    def _load_feedback(self) -> ErrorFeedback:
        place = self.workplace
        return place.state.error_feedback(bundle=place.bundle, run=self.run, num_parameters=place.num_parameters)

    def finish(self, nonce: bytes, reason: str = "") -> None:
        """A plan is not to be looked at again, for this reason; "" where its update was accepted."""
        self.done[nonce] = reason
        if len(self.done) > REMEMBERED_PLANS:
            del self.done[next(iter(self.done))]

    def train(self, plan: Plan) -> None:
        """Trains as planned, and sends the update."""
        place = self.workplace
        self._secure.check(plan)
        if plan.secure and self._feedback.trained_on == plan.vector:
            # An attempt at this round was given up: what was learnt waits in the residual.
            self._aggregate_securely(plan)
            return
        check_bundle(place.session, plan.training)
        self._budget.check(plan.training, len(place.training_data))
        parameters = place.personalized(plan, place.held.advance(plan, self._fetch_for(plan)))
        server_control = self._server_control(plan)
        started = self._clock()
        result = train(
            place.session,
            parameters,
            place.training_data,
            plan.training,
            seed=mix_seed(plan.seed, self._config.name, plan.round),
            gradient_correction=None if server_control is None else server_control - self._own_control(plan).vector,
            may_continue=lambda: self._may_continue(plan),
        )
        # Encoding takes memory, too.
        place.session.release()
        if result.stopped is not None:
            logger.info("round %d: training stopped: %s", plan.round, result.stopped)
            if not self._is_over(plan):
                self.decline(plan, result.stopped)
            return
        self._budget.charge(plan.training, len(place.training_data))
        if plan.secure:
            place.keep_personal(plan, result.parameters)
            self._feedback.hold(place.shared(result.parameters - parameters), trained_on=plan.vector)
            self._aggregate_securely(plan, self._clock() - started)
            return
        offsets = tuple(entry.offset for entry in place.session.manifest.parameters)
        update = self._feedback.prepare(
            place.shared(result.parameters - parameters),
            plan.codec,
            seed=mix_seed(plan.seed, self._config.name + "/codec", plan.round),
            offsets=offsets,
            max_norm=plan.training.max_delta_norm,
        )
        control = b""
        if server_control is not None:
            change = control_change(server_control, parameters, result.parameters, plan.training, result.steps)
            control = encode(
                place.shared(change),
                plan.codec,
                seed=mix_seed(plan.seed, self._config.name + "/control", plan.round),
                offsets=offsets,
            )
        place.keep_personal(plan, result.parameters)
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
        self.settle_pending()

    def _aggregate_securely(self, plan: Plan, seconds: float = 0.0) -> None:
        """Takes part with what is in the residual, after so many seconds of training."""
        masked = self._secure.take_part(
            plan,
            self._feedback,
            weight=len(self.workplace.training_data),
            seed=mix_seed(plan.seed, self._config.name + "/codec", plan.round),
            resources=lambda: self._resources(seconds),
            fetch=self._fetch_for(plan),
            is_over=lambda: self._is_over(plan),
        )
        if masked:
            self.settle_pending()

    def evaluate(self, plan: Plan) -> None:
        """Evaluates parameters on local data, and reports."""
        place = self.workplace
        data = place.validation_data or place.training_data
        parameters = place.personalized(plan, place.held.advance(plan, self._fetch_for(plan)))
        started = self._clock()
        summary = evaluate(place.session, parameters, data)
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

    def settle_pending(self, *, resumed: bool = False) -> None:
        """Sends the pending update until the coordinator says what became of it.

        Args:
            resumed: the coordinator may have a part of it already, from an earlier process or connection.
        """
        feedback, mail = self._feedback, self._mail
        if feedback.offer is None:
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
        self.finish(offer.nonce, why_not_again[:1000])
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

    def _server_control(self, plan: Plan) -> Vector | None:
        length = self.workplace.num_parameters
        if plan.control is None:
            return None
        data = self._fetch_for(plan)(plan.control, limit=8 * length + 4096)
        control = decode(data, Limits(max_parameters=length)).dense()
        if len(control) != length:
            raise CodecError("the coordinator's control variate is not of the bundle's length")
        return control

    def _own_control(self, of: Plan | Offer) -> ControlVariate:
        if self._control is None or self._control.run != of.run:
            place = self.workplace
            self._control = place.state.control_variate(run=of.run, num_parameters=place.num_parameters)
        return self._control

    def _may_continue(self, plan: Plan) -> bool | str:
        self._mail.pump(0)
        if plan.nonce in self._mail.closed:
            return "the round has closed"
        return self._policy.objection() or True

    def _sayable(self, loss: float, metrics: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
        """The metrics that may leave the device."""
        return {} if self._budget.withholds_metrics else _scalars(loss, metrics)

    def decline(self, plan: Plan, reason: str) -> None:
        """Tells the coordinator not to wait."""
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


def _scalars(loss: float, metrics: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, float]:
    """Loss and scalar metrics, finite ones only; the mean of `correct` is the accuracy."""
    values = {"loss": loss}
    for name, value in metrics.items():
        if value.ndim == 0:
            values["accuracy" if name == "correct" else name] = float(value)
    return {name: value for name, value in values.items() if math.isfinite(value)}

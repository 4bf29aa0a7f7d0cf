"""The client: joins a federation over MQTT, trains when it is asked to, sends compressed updates.

One thread owns all state. It is sequential code (fetch, train, send, wait for the verdict) that looks into
its mailbox whenever it waits or finishes a micro-batch.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from edgetrain import __version__
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.errors import StateError, TrainingError
from edgetrain.edge_client.host.device import device_info, device_state, is_news
from edgetrain.edge_client.host.policy import Policy
from edgetrain.edge_client.mailbox import Abandoned, Mailbox, RunOver
from edgetrain.edge_client.privacy.sample_budget import DeviceBudget
from edgetrain.edge_client.privacy.secure_aggregation import SecureParticipation
from edgetrain.edge_client.rounds import ComeBack, Rounds
from edgetrain.edge_client.runtimes import available_runtimes
from edgetrain.edge_client.workplace import Workplace
from edgetrain.protocol import BlobError, CodecError
from edgetrain.protocol.codecs import supported_stages
from edgetrain.protocol.errors import ConfigError, SecureAggregationError
from edgetrain.protocol.messages import (
    DeviceState,
    Goodbye,
    Hello,
    Ready,
    encode_message,
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
        # Set by `_join`, in this order.
        self._workplace: Workplace | None = None
        self._rounds: Rounds | None = None

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
                    self._take_part(self._join())
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
            self._secure.close()
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

    def _join(self) -> Rounds:
        """Hello, Welcome, the bundle, Ready."""
        mail = self._mail
        mail.wait(lambda: (mail.announce is not None and mail.announce.status == "open") or self._finished())
        announce = mail.announce
        assert announce is not None, "just waited for"
        if announce.status == "ended":
            raise RunOver("the run ended meanwhile")
        mail.joined, mail.welcomed, mail.plan = announce.run, False, None
        self._send_hello()
        mail.wait(lambda: mail.welcomed, repeat=self._send_hello)
        if self._workplace is None or self._workplace.bundle != announce.bundle.digest:
            self._workplace = self._rounds = None
            self._workplace = Workplace.set_up(announce.bundle, mail=mail, state=self._state, config=self._config)
        if self._rounds is None or self._rounds.run != announce.run:
            self._rounds = Rounds(
                announce.run,
                self._workplace,
                config=self._config,
                mail=mail,
                transport=self._transport,
                secure=self._secure,
                budget=self._budget,
                policy=self._policy,
                clock=self._clock,
            )
        self._send_ready(self._rounds)
        return self._rounds

    def _introduce(self) -> None:
        """To a coordinator, or over a broker, that may not know us."""
        self._send_hello()
        if self._rounds:
            self._send_ready(self._rounds)
            if self._rounds.pending and self._mail.upload:
                self._mail.send(self._rounds.pending)

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

    def _tell_news(self, rounds: Rounds) -> None:
        if is_news(self._told, device_state()):
            self._send_ready(rounds)

    def _send_ready(self, rounds: Rounds) -> None:
        place = rounds.workplace
        self._told = device_state()
        self._mail.send(
            Ready(
                bundle=place.bundle,
                runtime=place.session.runtime,
                num_examples=len(place.training_data),
                state=self._told,
                connection=self._connection,
            )
        )

    # --- rounds --------------------------------------------------------------------------------------

    def _take_part(self, rounds: Rounds) -> None:
        mail = self._mail
        rounds.settle_pending(resumed=True)
        while True:
            # Whoever was not invited because of its battery or its heat says when that is over.
            mail.wait(lambda: mail.plan is not None, repeat=lambda: self._tell_news(rounds))
            plan, mail.plan = mail.plan, None
            assert plan is not None, "just waited for"
            if plan.nonce in mail.closed:
                continue
            if (reason := rounds.done.get(plan.nonce)) is not None:
                if reason:
                    # The round is tried again: silence would hold it up until its deadline.
                    rounds.decline(plan, reason)
                continue
            if plan.bundle != rounds.workplace.bundle:
                rounds.decline(plan, "has another bundle")
                continue
            try:
                # What could not be settled because the disk was full.
                rounds.settle_pending()
                if reason := self._policy.objection():
                    logger.warning("round %d: declined: %s", plan.round, reason)
                    rounds.decline(plan, reason)
                elif plan.task == "train":
                    rounds.train(plan)
                else:
                    rounds.evaluate(plan)
            except Abandoned:
                logger.info("round %d: over before its parameters came", plan.round)
            except StateError as error:
                # A full or a read-only disk: what is on it counts, and somebody may make room.
                logger.error("round %d: declined: %s", plan.round, error)  # noqa: TRY400 - it says what and where
                self._mail.end_upload()
                rounds.take_up()
                rounds.decline(plan, str(error)[:1000])
            except (
                TrainingError,
                CodecError,
                BlobError,
                ConfigError,
                PrivacyError,
                SecureAggregationError,
            ) as error:
                logger.warning("round %d: %s", plan.round, error)
                rounds.finish(plan.nonce, str(error)[:1000])
                rounds.decline(plan, str(error)[:1000])

"""Taking part in secure aggregation: keys, shares, the masked update, and one share of every neighbour at the end.

The state of the session is in `secure.bin` (mode 0600) before any message leaves that was made from it: a client
that starts again goes on where it was, and cannot be brought to do a step a second time in another way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.error_feedback import ErrorFeedback
from edgetrain.edge_client.durable.installation import Fetch
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.errors import StateError
from edgetrain.edge_client.host.device import device_state
from edgetrain.edge_client.mailbox import Mailbox
from edgetrain.edge_client.privacy.enrolled import who_is_enrolled
from edgetrain.edge_client.privacy.sum_budget import SumBudget
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.messages import BlobRef, Decline, Offer, Plan, Resources, Secure
from edgetrain.protocol.privacy.randomness import Keystream
from edgetrain.protocol.secure_aggregation import member as members
from edgetrain.protocol.secure_aggregation.arithmetic import quantize
from edgetrain.protocol.secure_aggregation.member import Member
from edgetrain.protocol.secure_aggregation.messages import (
    Agreements,
    Boxes,
    FromServer,
    RosterReady,
    Survivors,
    decode_from_server,
    decode_settings,
    session_digest,
    work_digest,
)
from edgetrain.protocol.secure_aggregation.noise import share_of
from edgetrain.protocol.secure_aggregation.support import support_of

logger = logging.getLogger(__name__)

# A roster of as many clients as there may be takes less.
MAX_ROSTER_BYTES = 32 << 20


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    run: bytes
    round: int
    nonce: bytes
    member: Member


class SecureParticipation:
    """This client in secure aggregation.

    Args:
        config: of the client.
        state: its directory.
        mail: its mailbox.
    """

    def __init__(self, config: ClientConfig, *, state: ClientState, mail: Mailbox) -> None:
        self._config = config
        self._state = state
        self._mail = mail
        self._path = state.path / "secure.bin"
        self._stored = self._load()
        # The newest of each that has not been looked at.
        self._roster_ready: RosterReady | None = None
        self._boxes: Boxes | None = None
        self._is_enrolled = who_is_enrolled(config)
        self._sums = SumBudget(
            state.path / "privacy-sums.json",
            config.name,
            epsilon=config.secure_aggregation.epsilon,
            delta=config.secure_aggregation.delta,
        )
        mail.on_secure = self._on_message

    def check(self, plan: Plan) -> None:
        """Whether this client goes along with a plan.

        Raises:
            SecureAggregationError: it does not, and nothing was sent.
            PrivacyError: this device's budget does not allow it.
        """
        asked = self._config.secure_aggregation
        if not plan.secure:
            if asked.required or asked.epsilon:
                raise SecureAggregationError("this client sends updates in secure aggregation only")
            return
        if plan.control is not None:
            raise SecureAggregationError("control variates are sent beside the update, in the clear")
        settings = decode_settings(plan.secure)
        if settings.minimum < asked.least_clients:
            raise SecureAggregationError(
                f"sums of {settings.minimum} clients: this client asks for {asked.least_clients}"
            )
        if settings.noise_multiplier < asked.least_noise:
            raise SecureAggregationError(
                f"sums with a noise multiplier of {settings.noise_multiplier:g}: this client asks for "
                f"{asked.least_noise:g}"
            )
        self._sums.check(settings)
        before = self._stored
        again = before and (before.run, before.round) == (plan.run, plan.round) and before.nonce != plan.nonce
        if before and again and before.member.phase == "revealed":
            # A second sum of the same updates would show, by subtraction, who was left out of it.
            raise SecureAggregationError("this client has already helped to unmask a sum of this round")

    def take_part(
        self,
        plan: Plan,
        feedback: ErrorFeedback,
        *,
        weight: int,
        seed: int,
        resources: Callable[[], Resources],
        fetch: Fetch,
        is_over: Callable[[], bool],
    ) -> bool:
        """From the keys to the masked update, which is then pending in `feedback`.

        Args:
            plan: with the settings.
            feedback: its residual is what there is to send.
            weight: number of examples.
            seed: for rounding.
            resources: what the client has spent.
            fetch: gets blobs.
            is_over: whether the round has ended meanwhile.

        Returns:
            Whether there is a pending update; False if the round ended before.

        Raises:
            SecureAggregationError: not with what the coordinator says. Nothing was revealed.
            BlobError, StateError: see `fetch`; the state cannot be written.
        """
        settings = decode_settings(plan.secure)
        reference = BlobRef(digest=settings.positions, size=settings.positions_bytes) if settings.positions else None
        positions = fetch(reference, limit=16 * settings.count + 1024) if reference else b""
        support = support_of(settings, len(feedback.residual), positions)
        member = self._open_session(plan)
        if member.phase == "advertised":
            self._answer(plan, member)
            if not self._wait(plan, lambda: self._roster_ready is not None, is_over):
                return False
            ready = self._roster_ready
            assert ready, "just waited for"
            roster = fetch(BlobRef(digest=ready.digest, size=ready.size), limit=MAX_ROSTER_BYTES)
            member, _ = members.share(
                member,
                roster,
                random=os.urandom,
                is_enrolled=self._is_enrolled,
                least_clients=self._config.secure_aggregation.least_clients,
                colluding=self._config.secure_aggregation.max_colluding,
            )
            self._keep(plan, member)
        if member.phase != "shared":
            raise SecureAggregationError("this client's part in this session was lost")
        self._answer(plan, member)
        if not self._wait(plan, lambda: self._boxes is not None, is_over):
            return False
        assert self._boxes, "just waited for"
        noise = share_of(settings, Keystream())
        quantized = quantize(
            limited(feedback.residual[support], settings.max_norm),
            weight,
            settings.quantizer,
            member.cast.layout,
            seed=seed,
            noise=noise,
            exact_norm=settings.max_norm if noise else 0.0,
        )
        member, payload = members.mask(member, self._boxes, quantized.integers)
        self._sums.charge(settings)
        # Before the update is stored: its keys are gone, so that nothing else is ever masked with them.
        self._keep(plan, member)
        # Nothing that was measured on the data: only sums of that leave.
        offer = Offer(
            run=plan.run,
            round=plan.round,
            nonce=plan.nonce,
            update=blob_ref(payload),
            num_examples=0,
            steps=0,
            resources=resources(),
            state=device_state(),
        )
        feedback.commit_masked(offer, payload, support, quantized.decoded)
        return True

    def close(self) -> None:
        """Lets go of what is open."""
        self._sums.close()

    def _open_session(self, plan: Plan) -> Member:
        """Goes on with the session on disk if it is this one, else begins it."""
        key, name = self._state.key, self._config.name
        session = session_digest(
            federation=self._config.federation,
            run=plan.run,
            round_number=plan.round,
            nonce=plan.nonce,
            work=work_digest(bundle=plan.bundle, vector=plan.vector, training=plan.training, personal=plan.personal),
            settings=plan.secure,
        )
        if self._stored and self._stored.member.session == session:
            return self._stored.member
        self._roster_ready = self._boxes = None
        member, _ = members.advertise(
            session=session,
            settings=plan.secure,
            name=name,
            identity=key.public_key,
            sign=key.sign,
            random=os.urandom,
            enrolment=bytes.fromhex(self._config.enrolment),
        )
        self._keep(plan, member)
        return member

    def _wait(self, plan: Plan, arrived: Callable[[], bool], is_over: Callable[[], bool]) -> bool:
        """False if the round ended first."""
        self._mail.wait(lambda: arrived() or is_over(), repeat=lambda: self._repeat(plan))
        return arrived() and not is_over()

    def _repeat(self, plan: Plan) -> None:
        if self._stored and self._stored.nonce == plan.nonce:
            self._answer(plan, self._stored.member)

    def _answer(self, of: Plan | Secure, member: Member) -> None:
        self._mail.send(Secure(run=of.run, round=of.round, nonce=of.nonce, body=member.reply))

    # --- what comes in -------------------------------------------------------------------------------

    def _on_message(self, message: Secure) -> None:
        """Called by the mailbox while it is being waited for something."""
        stored = self._stored
        if stored is None or message.nonce != stored.nonce:
            return
        try:
            self._step(message, stored.member, decode_from_server(message.body))
        except SecureAggregationError as error:
            logger.warning("round %d: secure aggregation: %s", message.round, error)
            self._mail.send(Decline(round=message.round, nonce=message.nonce, reason=str(error)[:1000]))

    def _step(self, of: Secure, member: Member, message: FromServer) -> None:
        match message:
            case RosterReady():
                self._roster_ready = message
                if member.phase == "shared":
                    self._answer(of, member)
            case Boxes():
                self._boxes = message
            case Survivors() if message.survivors == member.survivors:
                self._answer(of, member)
            case Survivors():
                member, _ = members.agree(member, message, sign=self._state.key.sign)
                self._keep(of, member)
                self._answer(of, member)
            case Agreements():
                member, _ = members.reveal(member, message)
                self._keep(of, member)
                self._answer(of, member)

    # --- the file ------------------------------------------------------------------------------------

    def _keep(self, of: Plan | Secure, member: Member) -> None:
        if self._stored and self._stored.member == member:
            return
        stored = _Stored(run=of.run, round=of.round, nonce=of.nonce, member=member)
        try:
            write_atomically(self._path, msgspec.msgpack.encode(stored), mode=0o600)
        except OSError as error:
            raise StateError(f"{self._path}: cannot store the session: {error}") from error
        self._stored = stored

    def _load(self) -> _Stored | None:
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=_Stored)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self._path}: cannot read the session: {error}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            logger.warning("%s is damaged (%s): the session in it is lost", self._path, error)
            return None


Values = npt.NDArray[np.float32]


def limited(values: Values, max_norm: float) -> Values:
    """Scaled down to an L2 norm; 0 for no limit. Nobody but the client itself can see whether it does this."""
    norm = float(np.linalg.norm(values.astype(np.float64)))
    if not max_norm or norm <= max_norm:
        return values
    return (values.astype(np.float64) * (max_norm / norm)).astype(np.float32)

"""A coordinator that sees sums of updates only.

A round: invite, clients train, and those who are done advertise keys; then the phases of secure aggregation
(`round`). An attempt that loses too many clients before shares are revealed is given up, nothing is revealed,
and the round is tried again with fresh keys: clients keep what they have learnt. Once shares are revealed the round
cannot be tried again, or two sums over different clients would show the difference; then it ends without a change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.coordinator import events
from edgetrain.coordinator.coordinator import MAX_RETRY_SECONDS, Coordinator
from edgetrain.coordinator.errors import RoundFailed, RunError, UpdateRefused
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Part
from edgetrain.coordinator.rounds.uploads import accepted_record, accepted_verdict
from edgetrain.coordinator.run.records import ClientRow
from edgetrain.coordinator.secure.records import SecureOpened, SecureRecord
from edgetrain.coordinator.secure.round import SecureRound
from edgetrain.coordinator.secure.settings import chosen_positions, remembered, round_settings, with_noise
from edgetrain.coordinator.strategies import Contribution, Strategy
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.messages import Verdict
from edgetrain.protocol.secure_aggregation.arithmetic import Total
from edgetrain.protocol.secure_aggregation.messages import Settings, decode_settings, encode, work_digest
from edgetrain.protocol.secure_aggregation.support import support_of

logger = logging.getLogger(__name__)


class SecureCoordinator(Coordinator):
    """Arguments and errors as `Coordinator`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # Rounds in a row that have ended without a change.
        self._spent = 0

    def _make_strategy(self) -> Strategy:
        return with_noise(self._config, super()._make_strategy(), self._bundle.manifest.num_parameters)

    def _run_round(self, number: int) -> None:
        limit = self._config.rounds.max_failures
        attempt, given_up = 0, set[bytes]()
        while True:
            attempt += 1
            current = self._agenda.current = self._open_round(number)
            current.state.attempt, current.given_up = attempt, frozenset(given_up)
            try:
                self._aggregate(current)
            except (SecureAggregationError, UpdateRefused) as error:
                revealing = current.secure is not None and current.secure.revealing
                reason = f"round {number}, attempt {attempt}: no sum: {error}{current.said()}"
                logger.warning("%s", reason)
                self._chronicle.abandoned(number, attempt, reason, revealing=revealing)
                self._give_up(current, str(error), again=not revealing)
                given_up.add(current.state.nonce)
                if current.drawn is not None and not revealing:
                    self._keep_draw(number, current.drawn)
                self._spent += revealing
                if limit and max(attempt, self._spent) >= limit:
                    raise RoundFailed(
                        f"{reason}. Raise secure_aggregation.max_dropout, secure_aggregation.phase_seconds or "
                        "rounds.deadline_seconds, or look at the clients' logs; the run can go on from here."
                    ) from error
                if revealing:
                    return
                retry_at = self._clock() + min(2.0 ** (attempt - 1), MAX_RETRY_SECONDS)
                self._pump.until(lambda at=retry_at: self._clock() >= at)  # type: ignore[misc]
            else:
                self._spent = 0
                self._close_round(current)
                return

    def _keep_draw(self, number: int, drawn: frozenset[str]) -> None:
        """For the next attempt, of this process or of another: whoever is drawn is drawn once for a round.

        Another draw in place of one that failed would not be by chance alone.
        """
        following = super()._open_round(number)
        following.collection.invite(sorted(drawn))
        following.collection.commit()
        following.collection.close()

    def _open_round(self, number: int) -> OpenRound:
        current = super()._open_round(number)
        records = current.collection.secure_records
        if not records:
            # Drawn perhaps, but not invited: there is no session yet that a plan could name.
            current.state.forget_all()
        else:
            opened = records[0][0]
            assert isinstance(opened, SecureOpened), "a session's first record"
            try:
                self._begin(current, opened.settings, records[1:])
            except SecureAggregationError as error:
                current.collection.close()
                raise RunError(
                    f"{self._directory.journal_path(number)}: the session of secure aggregation cannot be taken up: "
                    f"{error}. Go on with the settings and the version of edgetrain that began it."
                ) from error
        return current

    def _begin(self, current: OpenRound, settings: bytes, records: Sequence[tuple[SecureRecord, bytes]] = ()) -> None:
        """Puts the session together, from the journal if an earlier process has left one."""
        secure = current.secure = SecureRound(
            federation=self._config.federation,
            run=self._directory.run,
            number=current.state.number,
            nonce=current.state.nonce,
            work=work_digest(
                bundle=self._bundle.digest,
                vector=current.vector,
                training=self._invitations.common_training(current),
                personal=self._config.personal,
            ),
            settings=settings,
            config=self._config.secure_aggregation,
            records=records,
            note=current.collection.note,
            commit=current.collection.commit,
            post=self._post,
            blobs=self._blobs,
            clients=self._clients.roster,
            clock=self._clock,
        )
        if positions := self._positions(decode_settings(settings)):
            secure.blobs.append(self._blobs.add(positions))
        for name in secure.advertised:
            current.state.place(name, Part.COLLECTING)

    def _positions(self, settings: Settings) -> bytes:
        return chosen_positions(self._config, settings.count, self._server_state) if settings.positions else b""

    def _aggregate(self, current: OpenRound) -> None:
        """From the invitations to the sum, folded and told to those who are in it.

        Raises:
            SecureAggregationError, UpdateRefused: there is none.
        """
        if current.secure is None or current.secure.server.phase == "advertise":
            self._gathering.wait(current)
        if current.secure is None:
            settings = encode(
                round_settings(
                    self._config,
                    number=current.state.number,
                    num_parameters=len(self._parameters),
                    state=self._server_state,
                    largest_weight=max((record.num_examples for record in self._clients.roster.all()), default=1),
                )
            )
            current.collection.note(SecureOpened(settings=settings))
            self._begin(current, settings)
        secure = current.secure
        assert secure, "begun"
        if secure.server.phase == "advertise":
            self._invite(current)
        elif current.invited_at is None:
            current.invited_at = self._clock()
        parts = current.state.parts
        self._pump.until(
            lambda: secure.step(
                may_close_roster=lambda: self._roster_is_complete(current),
                is_gone=lambda name: parts.get(name) in {Part.DECLINED, Part.REFUSED},
            )
        )
        self._fold(current, secure, secure.result())

    def _roster_is_complete(self, current: OpenRound) -> bool:
        rounds, state = self._config.rounds, current.state
        assert current.secure, "begun"
        done = len(current.secure.advertised)
        if done >= state.goal:
            return True
        if self._clock() < state.deadline_at and state.count(Part.INVITED, Part.TRAINING):
            return False
        if done < rounds.least:
            raise SecureAggregationError(f"{done} clients have trained, {rounds.least} are needed")
        return True

    def _fold(self, current: OpenRound, secure: SecureRound, total: Total) -> None:
        settings = decode_settings(secure.settings)
        num_parameters, state = len(self._parameters), current.state
        support = support_of(settings, num_parameters, self._positions(settings))
        if settings.noise_multiplier:
            # Every client in it or not must make the same difference: so not by the number that came.
            mean = (total.mean * (len(secure.survivors) / self._config.rounds.goal)).astype(np.float32)
        else:
            mean = limited(total.mean, settings.max_norm)
        indices = support if len(support) < num_parameters else None
        roster = self._clients.roster
        rows = [
            ClientRow(
                round=state.number,
                client=name,
                status="accepted",
                num_examples=roster[name].num_examples if name in roster else 0,
                update_bytes=secure.offers[name].update.size,
            )
            for name in secure.survivors
        ]
        current.collection.fold_sum(
            Contribution(f"the sum of {len(rows)}", total.weight, 1, SparseOrDense(num_parameters, indices, mean)),
            rows,
            {name: offer.update.digest for name, offer in secure.offers.items()},
        )
        self._server_state = remembered(self._config, self._server_state, settings, total, support, num_parameters)
        now = self._clock()
        for accepted, row in enumerate(rows, start=1):
            name, offer = row.client, secure.offers[row.client]
            state.place(name, Part.ACCEPTED)
            current.durations[name] = now - current.invited.get(name, now)
            if record := roster.get(name):
                record.last_accepted = (state.number, offer.update.digest)
            self._directory.audit.append(accepted_record(row, offer.update.digest))
            self._observe(events.UpdateAccepted(state.number, name, offer.update.size, accepted))
            # The journal has everything that the sum is made of: it counts, whatever happens to this process.
            self._post.send(name, accepted_verdict(offer, self._uploads.come_back(name)))

    def _give_up(self, current: OpenRound, reason: str, *, again: bool) -> None:
        offers = {name: upload.offer for name, upload in current.uploads.items()}
        if current.secure:
            offers |= current.secure.offers
        for name, offer in offers.items():
            digest = offer.update.digest
            verdict = Verdict(round=offer.round, digest=digest, accepted=False, reason=f"no sum: {reason}"[:1000])
            self._post.send(name, verdict)
        if again:
            self._dismiss(current)
            current.collection.close()
            # The next attempt has another nonce; noted before the journal of this one is gone.
            opened = self._directory.opened_round(current.state.number)
            assert opened, "noted when it was opened"
            fresh = msgspec.structs.replace(opened, nonce=os.urandom(16), salt=os.urandom(16))
            self._directory.note_opened(fresh)
            self._directory.journal_path(current.state.number).unlink()
            self._agenda.current = None
            return
        strategy = self._strategy
        self._strategy = replace(strategy, finish=lambda _partial, parameters, state: (parameters.copy(), state))
        try:
            self._close_round(current)
        finally:
            self._strategy = strategy


def limited(mean: npt.NDArray[np.float64], max_norm: float) -> npt.NDArray[np.float32]:
    """Scaled down to what a mean of clients that keep to the limit cannot exceed; 0 for no limit."""
    norm = float(np.linalg.norm(mean))
    return (mean * (max_norm / norm) if max_norm and norm > max_norm else mean).astype(np.float32)

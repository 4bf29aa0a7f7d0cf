"""Asynchronous aggregation: no client waits for another.

A "round" is here the filling of a buffer of `rounds.goal` updates. Clients are invited whenever one is free,
up to `rounds.concurrency` at a time, and train from the parameters of that moment; what they send counts in
whichever buffer is open when it arrives, scaled by its staleness (see `strategies.fedbuff`). A client counts
once per buffer: invited twice to the same parameters, it would send the same update twice.
"""

from __future__ import annotations

import logging
from typing import Any

from edgetrain.coordinator import events
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.errors import RoundFailed
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import OUTSTANDING, Part
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.messages import BlobRef

logger = logging.getLogger(__name__)


class BufferedCoordinator(Coordinator):
    """A coordinator whose clients come and go at their own pace. Arguments and errors as `Coordinator`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self._config.evaluation.by_clients_every:
            raise ConfigError(
                "evaluation.by_clients_every: clients of an asynchronous strategy are never all free at "
                "once; set it to 0, the final parameters are still evaluated"
            )
        # What each client that is out works on: the number of its buffer, and when to give it up.
        self._working: dict[str, tuple[int, float]] = {}
        self._blobs_of: dict[int, list[BlobRef]] = {}
        self._last: OpenRound | None = None

    def _run_round(self, number: int) -> None:
        rounds = self._config.rounds
        current = self._agenda.current = self._open_round(number)
        self._blobs_of[number] = current.blobs
        if self._last:
            current.take_over(self._last)
        if not self._gathering.done_before:
            self._gathering.wait(current)
        state = current.state
        current.invited_at = started = self._clock()
        state.deadline_at = started + rounds.deadline_seconds
        self._observe(events.RoundStarted(number, state.attempt, state.count(*OUTSTANDING)))

        def closed() -> bool:
            self._give_up_on_late(current)
            self._invite_free(current)
            now, accepted = self._clock(), state.count(Part.ACCEPTED)
            if accepted >= rounds.goal or (accepted >= rounds.least and now >= state.deadline_at):
                return True
            if rounds.idle_timeout_seconds and now - started > rounds.idle_timeout_seconds:
                raise RoundFailed(f"buffer {number}: {accepted} of {rounds.goal} updates after {now - started:.0f} s")
            return False

        self._pump.until(closed)
        self._last = current
        self._close_round(current)

    def _invite_free(self, current: OpenRound) -> None:
        """Invites as many as may work at the same time."""
        concurrency = self._config.rounds.concurrency
        out = current.state.count(*OUTSTANDING)
        free = [name for name in self._invitations.pool(current) if not current.state.waits_for(name)]
        wanted = min(len(free), concurrency - out) if concurrency else len(free)
        if wanted <= 0:
            return
        # Another choice every time, and the same again for the same order of events.
        current.invitations += 1
        now = self._clock()
        number, attempt = current.state.number, current.invitations
        # Where selection is "all", concurrency still holds.
        chosen = self._invitations.choose(free, wanted, number=number, attempt=attempt)[:wanted]
        current.collection.invite(chosen)
        for name in chosen:
            current.state.invite(name)
            current.invited[name] = now
            self._working[name] = (current.state.number, now + self._config.rounds.deadline_seconds)
            self._send_plan(current, name)

    def _give_up_on_late(self, current: OpenRound) -> None:
        now = self._clock()
        for name, (_, due) in list(self._working.items()):
            if not current.state.waits_for(name):
                del self._working[name]
            elif now > due and current.state.parts[name] is not Part.COLLECTING:
                logger.info("%s is given up on", name)
                current.state.advance(name, Part.LOST)
                del self._working[name]

    def _dismiss(self, current: OpenRound) -> None:
        """Nobody stops; parameters that nobody works on any more are forgotten."""
        newest = current.state.number
        needed = {number for number, _ in self._working.values()} | {newest}
        kept = {blob.digest for number in needed for blob in self._blobs_of.get(number, [])}
        for number in [number for number in self._blobs_of if number not in needed]:
            for blob in self._blobs_of.pop(number):
                if blob.digest not in kept:
                    self._blobs.remove(blob)
        current.forget_nonces(needed)

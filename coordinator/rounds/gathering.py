"""Waiting until enough clients are there for a round."""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.coordinator import events
from edgetrain.coordinator.config import RoundsConfig
from edgetrain.coordinator.errors import RoundFailed
from edgetrain.coordinator.pump import Pump
from edgetrain.coordinator.rounds.invitations import Invitations
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Part


class Gathering:
    """Waits for clients; the first time a while longer, for all of them.

    Args:
        rounds: the settings.
        invitations: knows who can be invited.
        pump: handles events meanwhile.
        observe: is told how many are there.
        clock: monotonic seconds.
        wanted: clients that a round need not wait for more than; 0 for its goal.
    """

    def __init__(
        self,
        rounds: RoundsConfig,
        *,
        invitations: Invitations,
        pump: Pump,
        observe: events.Observer,
        clock: Callable[[], float],
        wanted: int = 0,
    ) -> None:
        self._wanted = wanted or rounds.goal
        self._rounds = rounds
        self._invitations = invitations
        self._pump = pump
        self._observe = observe
        self._clock = clock
        # Before its first round, a coordinator waits a while for all that are there.
        self.done_before = False

    def wait(self, current: OpenRound) -> None:
        """Returns when the round can start.

        Raises:
            RoundFailed: too few for too long.
        """
        rounds = self._rounds
        patience = 0.0 if self.done_before else rounds.gather_seconds
        self.done_before = True
        start = self._clock()
        shown: int | None = None

        def enough() -> bool:
            nonlocal shown
            ready = len(self._invitations.pool(current))
            accepted = current.state.count(Part.ACCEPTED)
            waited = self._clock() - start
            if ready + accepted >= self._wanted:
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
                self._observe(events.Waiting(ready, self._wanted - accepted))
            return False

        self._pump.until(enough)

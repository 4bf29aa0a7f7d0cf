"""Asking the clients to evaluate parameters on their own validation data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.pump import Pump
from edgetrain.coordinator.rounds.agenda import Agenda
from edgetrain.coordinator.rounds.downlink import WHOLE
from edgetrain.coordinator.rounds.invitations import Invitations
from edgetrain.protocol.codecs import encode

# Clients have so long to evaluate.
REPORT_SECONDS = 60.0


class ClientReports:
    """Collects evaluations by the clients, into `Agenda.reports`.

    Args:
        roster: whom to ask.
        invitations: makes the plan.
        blobs: serves the parameters.
        post: sends the plan.
        agenda: gets the reports.
        pump: waits for them.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        roster: Roster,
        invitations: Invitations,
        blobs: BlobServer,
        post: Post,
        agenda: Agenda,
        pump: Pump,
        clock: Callable[[], float],
    ) -> None:
        self._roster = roster
        self._invitations = invitations
        self._blobs = blobs
        self._post = post
        self._agenda = agenda
        self._pump = pump
        self._clock = clock

    def ask(self, round_number: int, parameters: npt.NDArray[np.float32]) -> None:
        """Asks all who are there, and returns when they have answered or their time is over.

        Args:
            round_number: after which the parameters are.
            parameters: float32 [num_parameters].
        """
        clients = self._roster.eligible()
        self._agenda.reports.clear()
        if not clients:
            return
        deadline = self._clock() + REPORT_SECONDS
        reference = self._blobs.add(encode(parameters, WHOLE))
        self._blobs.expect(reference, audience=len(clients))
        plan = self._agenda.evaluation_plan = self._invitations.evaluation_plan(
            round_number, parameters, reference, REPORT_SECONDS
        )
        for name in clients:
            self._post.send(name, plan)

        def complete() -> bool:
            reports = self._agenda.reports
            waiting = [name for name in clients if name not in reports and self._roster[name].online]
            return not waiting or self._clock() >= deadline

        self._pump.until(complete)
        self._agenda.evaluation_plan = None
        self._blobs.remove(reference)

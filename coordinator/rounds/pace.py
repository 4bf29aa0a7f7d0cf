"""Pace steering: clients that will not be needed for a while need not wait for us.

Bonawitz et al., "Towards Federated Learning at Scale: System Design", MLSys 2019, section 2.3: the server
tells devices when to come back, so that a small population is there together when it is needed, and a large
one does not come all at once.
"""

from __future__ import annotations

import hashlib


def come_back_seconds(
    *, population: int, per_round: int, round_seconds: float, at_least: float, client: str, round_number: int
) -> float:
    """When a client whose update was just accepted should come back; 0 for: stay.

    If every client is as likely to be invited, it is invited every population / per_round rounds. It is asked
    to stay away for half to all of the time until then, less a round: spread out, by its name and the round.

    Args:
        population: clients known.
        per_round: clients invited per round.
        round_seconds: what a round takes.
        at_least: shorter absences are not worth it.
        client: its name.
        round_number: of the update.
    """
    between = round_seconds * (population / max(per_round, 1) - 1)
    digest = hashlib.sha256(f"{client}/{round_number}".encode()).digest()
    seconds = between * (0.5 + 0.5 * int.from_bytes(digest[:4], "little") / 2**32)
    return seconds if seconds >= at_least else 0.0

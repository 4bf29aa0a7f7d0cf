"""Counting payload bytes, round by round."""

from __future__ import annotations

from edgetrain.coordinator.clients.roster import Roster


def count_traffic(roster: Roster, *, resumed: bool) -> tuple[int, int]:
    """(bytes from clients, bytes that clients say they received) since this was asked last.

    Args:
        roster: the clients; what was counted is noted there.
        resumed: an earlier process has closed rounds of this run.
    """
    up = down = 0
    for record in roster.all():
        received = record.resources.bytes_received
        # A client counts from its own start: after ours, the first number says nothing about this round.
        before = received if resumed and not record.counted_down else record.counted_down
        up += record.bytes_up - record.counted_up
        down += max(0, received - before)
        record.counted_up, record.counted_down = record.bytes_up, received
    return up, down

"""Follows the enrolments while the run goes on: records them, sends revoked clients away, lets the broker know."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgetrain.coordinator.audit import AuditLog
from edgetrain.coordinator.audit.records import Enrolled, Revoked
from edgetrain.coordinator.clients.enrolments import Enrolments, revocation
from edgetrain.coordinator.clients.presence import Presence

# Who is sent away should hear why before the broker drops it. We refuse it at once.
LAST_WORD_SECONDS = 1.0


class Membership:
    """Looks at the registry whenever it is asked to.

    Args:
        enrolments: the registry; None where everybody may take part.
        presence: sends clients away.
        audit: the run's log.
        reload_broker: called after every change.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        enrolments: Enrolments | None,
        *,
        presence: Presence,
        audit: AuditLog,
        reload_broker: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._enrolments = enrolments
        self._presence = presence
        self._audit = audit
        self._reload_broker = reload_broker
        self._clock = clock
        # When the broker is to read its files again.
        self._reload_at = math.inf

    def follow(self) -> None:
        """Acts on what has changed since the last call; at the first, the log gets all keys that are in force.

        Raises:
            AuthorityError: the registry is damaged.
        """
        now = self._clock()
        if now >= self._reload_at:
            self._reload_at = math.inf
            self._reload_broker()
        changed = self._enrolments.changes() if self._enrolments else []
        for entry in changed:
            if entry.revoked_at:
                self._audit.append(Revoked(client=entry.name, public_key=entry.public_key))
                self._presence.dismiss(entry.name, revocation(entry))
            else:
                self._audit.append(Enrolled(client=entry.name, public_key=entry.public_key, by="authority"))
        if any(entry.revoked_at for entry in changed):
            self._reload_at = min(self._reload_at, now + LAST_WORD_SECONDS)
        elif changed:
            self._reload_broker()

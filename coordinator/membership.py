"""Follows the enrolments while the run goes on: records them, sends revoked clients away, lets the broker know."""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.coordinator.audit import AuditLog
from edgetrain.coordinator.audit.records import Enrolled, Revoked
from edgetrain.coordinator.enrolments import Enrolments
from edgetrain.coordinator.intake import Intake


class Membership:
    """Looks at the registry whenever it is asked to.

    Args:
        enrolments: the registry; None where everybody may take part.
        intake: sends clients away.
        audit: the run's log.
        reload_broker: called after every change.
    """

    def __init__(
        self,
        enrolments: Enrolments | None,
        *,
        intake: Intake,
        audit: AuditLog,
        reload_broker: Callable[[], None],
    ) -> None:
        self._enrolments = enrolments
        self._intake = intake
        self._audit = audit
        self._reload_broker = reload_broker
        self._reload_due = False

    def follow(self) -> None:
        """Acts on what has changed since the last call; at the first, the log gets all keys that are in force.

        Raises:
            AuthorityError: the registry is damaged.
        """
        if self._reload_due:
            self._reload_due = False
            self._reload_broker()
        changed = self._enrolments.changes() if self._enrolments else []
        for entry in changed:
            if entry.revoked_at:
                self._audit.append(Revoked(client=entry.name, public_key=entry.public_key))
                self._intake.dismiss(entry.name, f"{entry.name!r} was revoked on {entry.revoked_at}")
            else:
                self._audit.append(Enrolled(client=entry.name, public_key=entry.public_key, by="authority"))
        # A moment later, so that who is sent away hears why before the broker drops it.
        self._reload_due = bool(changed)

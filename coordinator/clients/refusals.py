"""What is refused: counted, told to observers, written to the audit log, and who does it too often is banned.

An offence counts against a client only if it is certainly the client's: it signed it, or the broker lets nobody
else write under its name. Otherwise anybody could have anybody banned.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from edgetrain.coordinator import events
from edgetrain.coordinator.audit import AuditLog
from edgetrain.coordinator.audit.records import Banned, RefusedMessage, RefusedUpdate
from edgetrain.coordinator.clients.roster import Roster
from edgetrain.coordinator.config import BansConfig
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Part
from edgetrain.protocol.messages import Offer

logger = logging.getLogger(__name__)

Kind = Literal[
    "malformed",  # does not decode, or breaks the schema
    "oversize",  # larger than the limits
    "forged",  # its sender did not sign it
    "foreign_id",  # says that it is from another client than the one whose topic it came on
    "replay",  # of another run, connection, or with another nonce than the round's
    "stale_round",  # for a round that has closed
    "not_invited",  # to the round that it is for
    "not_enrolled",  # the name or its key
    "revoked",
    "version",  # of the protocol
    "unfit",  # lacks what everybody needs, or has another bundle
    "bad_update",  # decodes to nothing that may be folded
    "bad_report",
    "secure_aggregation",  # does not fit its session; late, most likely
]
# What an honest client does not do, however slow or lossy its link is.
OFFENCES: frozenset[Kind] = frozenset(
    {"malformed", "oversize", "forged", "foreign_id", "replay", "not_invited", "not_enrolled", "bad_update"}
)
# Lines about one client in the audit log; what is more is counted in a later line. Strangers share one allowance.
LINES_PER_MINUTE = 30
STRANGERS = "?"
# A ban doubles every time, up to a day.
MAX_BAN_SECONDS = 86400.0


@dataclass(slots=True)
class _Book:
    """What is held against one client."""

    offences: deque[float] = field(default_factory=deque)
    bans: int = 0
    lines: deque[float] = field(default_factory=deque)
    unsaid: int = 0


class Refusals:
    """Keeps the books. Owned by the coordinator's thread.

    Args:
        config: [limits.bans].
        roster: marks who is banned.
        audit: the run's log.
        observe: is told what happens.
        clock: monotonic seconds.
        attributable: whether the broker lets nobody but a client write under its name.
    """

    def __init__(
        self,
        config: BansConfig,
        *,
        roster: Roster,
        audit: AuditLog,
        observe: events.Observer,
        clock: Callable[[], float],
        attributable: bool,
    ) -> None:
        self._config = config
        self._roster = roster
        self._audit = audit
        self._observe = observe
        self._clock = clock
        self._attributable = attributable
        self._books: dict[str, _Book] = {}
        # Somebody was banned whom the open round may wait for.
        self._newly_banned = False
        # How often, by kind; "banned" for what was not even looked at.
        self.counts: Counter[str] = Counter()

    def banned(self, client: str) -> bool:
        """Whether a message of this client is not looked at. Counts it."""
        record = self._roster.get(client)
        if record is None or self._clock() >= record.banned_until:
            return False
        self.counts["banned"] += 1
        self._book(client).unsaid += 1
        return True

    def message(self, client: str, kind: Kind, reason: str, *, signed: bool = False) -> None:
        """A message that was refused.

        Args:
            client: whose topic it came on.
            kind: of refusal.
            reason: for people.
            signed: whether the client's own signature is on it.
        """
        book = self._note(client, kind, reason)
        if self._may_write(book):
            unsaid, book.unsaid = book.unsaid, 0
            self._audit.append(RefusedMessage(client=client, kind=kind, reason=reason[:300], unsaid=unsaid))
        self._judge(client, kind, book, signed=signed)

    def update(self, client: str, kind: Kind, reason: str, offer: Offer) -> None:
        """An update that was refused; its offer bears the client's signature."""
        book = self._note(client, kind, reason)
        if self._may_write(book):
            self._audit.append(
                RefusedUpdate(
                    client=client,
                    round=offer.round,
                    digest=offer.update.digest.hex(),
                    kind=kind,
                    reason=reason[:300],
                )
            )
        self._judge(client, kind, book, signed=True)

    def drop_banned(self, current: OpenRound) -> None:
        """A round does not wait for those who are not listened to."""
        if not self._newly_banned:
            return
        self._newly_banned = False
        now = self._clock()
        for record in self._roster.all():
            if record.banned_until > now and current.state.waits_for(record.name):
                current.state.advance(record.name, Part.LOST)
                current.drop_upload(record.name)

    def _note(self, client: str, kind: Kind, reason: str) -> _Book:
        self.counts[kind] += 1
        logger.warning("refused from %s: %s", client, reason)
        self._observe(events.Refused(client, reason, kind))
        return self._book(client)

    def _book(self, client: str) -> _Book:
        return self._books.setdefault(client if self._roster.get(client) else STRANGERS, _Book())

    def _may_write(self, book: _Book) -> bool:
        now = self._clock()
        while book.lines and now - book.lines[0] >= 60:
            book.lines.popleft()
        if len(book.lines) >= LINES_PER_MINUTE:
            book.unsaid += 1
            return False
        book.lines.append(now)
        return True

    def _judge(self, client: str, kind: Kind, book: _Book, *, signed: bool) -> None:
        record, config, now = self._roster.get(client), self._config, self._clock()
        if not config.after or record is None or kind not in OFFENCES or not (signed or self._attributable):
            return
        book.offences.append(now)
        while now - book.offences[0] >= config.window_seconds:
            book.offences.popleft()
        if len(book.offences) < config.after:
            return
        seconds = min(config.seconds * 2.0**book.bans, MAX_BAN_SECONDS)
        record.banned_until = now + seconds
        self._newly_banned = True
        self._audit.append(Banned(client=client, seconds=seconds, offences=len(book.offences)))
        logger.warning("%s is banned for %.0f s after %d offences", client, seconds, len(book.offences))
        book.bans += 1
        book.offences.clear()

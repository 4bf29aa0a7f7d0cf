"""What the coordinator itself does, for the audit log; and the log's checkpoints, for the clients."""

from __future__ import annotations

import hashlib

from edgetrain.coordinator.audit import AuditLog
from edgetrain.coordinator.audit.records import Abandoned, Aggregated, Command, Ended, Invited, PrivacySpent
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.run.records import RoundRecord
from edgetrain.protocol.messages import LogPoint, Plan, encode_message


class Chronicle:
    """Writes to the audit log.

    Args:
        audit: the run's.
        post: for checkpoints.
    """

    def __init__(self, audit: AuditLog, post: Post) -> None:
        self._audit = audit
        self._post = post
        # There is a checkpoint that nobody has heard of, and it is being written.
        self._noted = self._sealed = False

    def command(self, command: str) -> None:
        """An operator's."""
        self._audit.append(Command(command=command))

    def invited(self, client: str, plan: Plan, attempt: int) -> None:
        """A plan that goes out."""
        digest = hashlib.sha256(encode_message(plan)).hexdigest()
        self._audit.append(Invited(client=client, round=plan.round, attempt=attempt, plan=digest))

    def abandoned(self, number: int, attempt: int, reason: str, *, revealing: bool = False) -> None:
        """An attempt at a round that came to nothing.

        Args:
            number: of the round.
            attempt: of that.
            reason: for people.
            revealing: whether clients had been asked for the shares that unmask a sum.
        """
        self._audit.append(Abandoned(round=number, attempt=attempt, reason=reason[:300], revealing=revealing))

    def aggregated(self, record: RoundRecord) -> None:
        """A round that is about to be committed.

        Raises:
            RunError: the disk did not take it.
        """
        self._audit.append(
            Aggregated(round=record.round, accepted=record.accepted, parameters=record.parameters_sha256)
        )
        self._audit.commit()

    def privacy_spent(self, number: int, *, epsilon: float, delta: float, mechanism: str) -> None:
        """What the federation has spent of its privacy budget, with the round whose noisy sum was just paid for.

        Raises:
            RunError: the disk did not take it.
        """
        self._audit.append(PrivacySpent(round=number, epsilon=epsilon, delta=delta, mechanism=mechanism))
        self._audit.commit()

    def ended(self, status: str, reason: str) -> None:
        """The process leaves. Publishes a last checkpoint.

        Raises:
            RunError: the disk did not take it.
        """
        self._audit.append(Ended(status=status, reason=reason[:300]))
        self.publish()

    def commit(self) -> None:
        """Seals what was recorded, and tells everyone of the checkpoints in it.

        Raises:
            RunError: the disk did not take it.
        """
        self.begin_commit()
        self.end_commit()

    def begin_commit(self) -> None:
        """Begins to `commit`; more can be recorded before `end_commit`.

        Raises:
            RunError: the disk did not take what was recorded before.
        """
        self._audit.begin_commit()
        self._sealed, self._noted = self._sealed or self._noted, False

    def end_commit(self) -> None:
        """Ends it.

        Raises:
            RunError: the disk did not take it.
        """
        self._audit.end_commit()
        if self._sealed:
            self._sealed = False
            self.tell()

    def note_checkpoint(self) -> None:
        """Says how far the log has come, with the next commit: so that it cannot be rewritten unnoticed.

        Raises:
            RunError: the disk did not take it.
        """
        self._audit.note_checkpoint()
        self._noted = True

    def publish(self) -> None:
        """Says so at once.

        Raises:
            RunError: the disk did not take it.
        """
        self.note_checkpoint()
        self.commit()

    def tell(self) -> None:
        """Says again what was said last: a broker may have forgotten it."""
        points = [LogPoint(records=point.records, head=point.hash) for point in self._audit.checkpoints]
        if points:
            self._post.publish_checkpoints(points)

"""What the audit log holds. Digests and numbers, never data, parameters or updates themselves.

Whoever has something else to record derives a class of its own from `AuditRecord`, with a tag. A field called
`client` is what `edgetrain audit show --client` looks for.
"""

from __future__ import annotations

import msgspec


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base of all records. Digests, keys and ids are hex. A whole line has at most 4 KiB."""


class Opened(AuditRecord, frozen=True, kw_only=True, tag="opened"):
    """First record of a log: whose it is, and the key that seals it."""

    run: str
    federation: str
    # SHA-256 of the bundle's manifest.
    bundle: str
    public_key: str
    # Rounds that had closed before the log began; 0 but for runs of older versions.
    rounds_before: int = 0


class Recovered(AuditRecord, frozen=True, kw_only=True, tag="recovered"):
    """What a start found amiss and put right."""

    # Bytes after the last seal that were cut off, and their SHA-256; a crash leaves some.
    cut_bytes: int = 0
    cut_sha256: str = ""
    # audit.head was missing or damaged: lines may have been cut off by somebody else. Compare with checkpoints.
    head_lost: bool = False


class Started(AuditRecord, frozen=True, kw_only=True, tag="started"):
    """A coordinator process began, with these settings."""

    edgetrain: str
    # SHA-256 of config.toml in the run directory.
    config: str
    # Rounds that have closed.
    rounds: int


class Command(AuditRecord, frozen=True, kw_only=True, tag="command"):
    """An operator's: pause, resume, stop, interrupt."""

    command: str


class Ended(AuditRecord, frozen=True, kw_only=True, tag="ended"):
    """The process left in order."""

    status: str
    reason: str


class Enrolled(AuditRecord, frozen=True, kw_only=True, tag="enrolled"):
    """A client's key that is trusted from here on: enrolled, or the first that came with the name."""

    client: str
    public_key: str
    # "authority": by `edgetrain enroll`; "first use": the first Hello of the name.
    by: str


class Revoked(AuditRecord, frozen=True, kw_only=True, tag="revoked"):
    """A client whose enrolment was taken back."""

    client: str
    public_key: str


class Invited(AuditRecord, frozen=True, kw_only=True, tag="invited"):
    """A plan that went out."""

    client: str
    round: int
    attempt: int = 1
    # SHA-256 of the plan's message body.
    plan: str


class Accepted(AuditRecord, frozen=True, kw_only=True, tag="accepted"):
    """An update that is in the sum."""

    client: str
    round: int
    digest: str
    bytes: int
    num_examples: int
    # Taken back from the journal after a restart: it may stand in an earlier line, too.
    from_journal: bool = False


class RefusedUpdate(AuditRecord, frozen=True, kw_only=True, tag="refused_update"):
    """An update that is not in the sum."""

    client: str
    round: int
    digest: str
    kind: str
    reason: str


class RefusedMessage(AuditRecord, frozen=True, kw_only=True, tag="refused_message"):
    """Another message that was refused."""

    client: str
    kind: str
    reason: str
    # So many more since the last line about this client, which had a line of their own no more.
    unsaid: int = 0


class Banned(AuditRecord, frozen=True, kw_only=True, tag="banned"):
    """A repeated offender, who is not listened to for a while."""

    client: str
    seconds: float
    offences: int


class Abandoned(AuditRecord, frozen=True, kw_only=True, tag="abandoned"):
    """An attempt at a round that came to nothing; the round is tried again, or ends without a change."""

    round: int
    attempt: int
    reason: str
    # Secure aggregation: clients had been asked for shares, so a sum of their updates may have been unmasked.
    revealing: bool = False


class Aggregated(AuditRecord, frozen=True, kw_only=True, tag="aggregated"):
    """A round's result, written just before the round is committed."""

    round: int
    accepted: int
    # SHA-256 of the parameters after the round, as little-endian float32.
    parameters: str


class PrivacySpent(AuditRecord, frozen=True, kw_only=True, tag="privacy"):
    """Privacy budget spent so far: of a client, or (client "") of the federation."""

    client: str = ""
    round: int
    epsilon: float
    delta: float
    # How it was counted and what noise was added.
    mechanism: str = ""


class Checkpoint(AuditRecord, frozen=True, kw_only=True, tag="checkpoint"):
    """What clients were told: the log's length and chain hash at that moment."""

    records: int
    head: str

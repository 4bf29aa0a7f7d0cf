"""What secure aggregation writes into the journal of a round: every step, so that another process can take it up.

Nothing in it is secret: it is what the coordinator may know.
"""

from __future__ import annotations

import msgspec


class SecureOpened(msgspec.Struct, frozen=True, kw_only=True, tag="secure-opened"):
    """A session begins."""

    # `secure_aggregation.messages.Settings`, as the plans have them.
    settings: bytes


class SecureReceived(msgspec.Struct, frozen=True, kw_only=True, tag="secure-received"):
    """A client's message."""

    client: str
    identity: bytes
    body: bytes


class SecureMasked(msgspec.Struct, frozen=True, kw_only=True, tag="secure-masked"):
    """A masked update; the payload holds its bytes."""

    client: str
    # The client's signed offer as it came.
    envelope: bytes


class SecureClosed(msgspec.Struct, frozen=True, kw_only=True, tag="secure-closed"):
    """A phase has ended with those who had answered."""

    phase: str


SecureRecord = SecureOpened | SecureReceived | SecureMasked | SecureClosed

"""Who may take part: the registry that `edgetrain enroll` and `edgetrain revoke` write, followed while it changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from edgetrain.coordinator.authority.registry import REGISTRY_FILE, AuthorityError, Enrolment, read_registry

logger = logging.getLogger(__name__)

Objection = tuple[Literal["not_enrolled", "revoked"], str]


class Enrolments:
    """The registry of a federation directory.

    Args:
        directory: as made by `edgetrain init`.

    Raises:
        AuthorityError: there is none, or it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / REGISTRY_FILE
        self._entries: dict[str, Enrolment] = {}
        self._stamp: tuple[int, int, int] | None = None

    def changes(self) -> list[Enrolment]:
        """What is new or different since the last call; at the first, everything.

        Raises:
            AuthorityError: the registry cannot be read, at the first call.
        """
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        except FileNotFoundError:
            stamp = None
        if stamp is not None and stamp == self._stamp:
            return []
        try:
            entries = {entry.name: entry for entry in read_registry(self._path.parent)}
        except AuthorityError as error:
            if self._stamp is None:
                raise
            # What was known holds: a damaged file ends no run, and lets nobody in.
            logger.error("%s; the enrolments stay as they were", error)  # noqa: TRY400
            self._stamp = stamp or (0, 0, 0)
            return []
        changed = [entry for name, entry in entries.items() if self._entries.get(name) != entry]
        self._entries, self._stamp = entries, stamp
        return changed

    def objection(self, client: str, public_key: bytes) -> Objection | None:
        """Why a client may not take part, or None.

        Args:
            client: its name.
            public_key: that it uses.
        """
        entry = self._entries.get(client)
        if entry is None:
            return "not_enrolled", f"{client!r} is not enrolled here: edgetrain enroll {client}"
        if entry.revoked_at:
            return "revoked", revocation(entry)
        if public_key.hex() != entry.public_key:
            return "not_enrolled", f"the name {client!r} is enrolled with another key: use its own device file"
        return None


def revocation(entry: Enrolment) -> str:
    """What a client that was revoked is told."""
    return (
        f"{entry.name!r} was revoked on {entry.revoked_at}. If that was not meant, whoever runs the federation lets it "
        f"in again with: edgetrain enroll {entry.name} --renew, and a copy of the new device file"
    )

"""The ledger's file: the budget that was promised, what was released, and who was in it, under a checksum.

Costs are worked out from the releases whenever they are needed, so a change of settings, of the accountant or of the
code neither forgives nor forgets anything. The checksum is against disks and editors, not against whoever can write
the file: what was spent also stands in the audit log, which is signed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.release import Release

FORMAT_VERSION = 2
# Of files from before there were checksums.
_WITHOUT_CHECKSUM = 1


class LedgerFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is in it."""

    format_version: int = FORMAT_VERSION
    # Whose: for people, and so that one is not taken for another.
    owner: str
    # None: no limit.
    epsilon: Annotated[float, Meta(gt=0)] | None
    delta: Annotated[float, Meta(gt=0, lt=1)]
    # Alike releases are one, with all their steps.
    releases: tuple[Release, ...] = ()
    # By name, how many steps of each release somebody was in, in their order; what is missing at the end is 0.
    participants: dict[str, tuple[Annotated[int, Meta(ge=0, le=2**53)], ...]] = {}
    # SHA-256 of the rest.
    checksum: str = ""

    @property
    def limit(self) -> float:
        """The largest epsilon; infinite for none."""
        return math.inf if self.epsilon is None else self.epsilon


def encode_ledger(file: LedgerFile) -> bytes:
    """The file's bytes, with their checksum."""
    whole = msgspec.structs.replace(file, format_version=FORMAT_VERSION)
    whole = msgspec.structs.replace(whole, checksum=_checksum(whole))
    return msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n"


def decode_ledger(data: bytes, *, where: str) -> LedgerFile:
    """The opposite.

    Args:
        data: of the file.
        where: it is, for messages.

    Raises:
        PrivacyError: damaged, or of a version that is not known here.
    """
    try:
        found = msgspec.json.decode(data, type=LedgerFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(where, str(error)) from error
    if found.format_version == _WITHOUT_CHECKSUM and not found.checksum:
        return found
    if found.checksum != _checksum(found):
        raise _damaged(where, "its checksum is another")
    if found.format_version != FORMAT_VERSION:
        raise PrivacyError(f"{where}: is a privacy ledger of version {found.format_version}: install a newer edgetrain")
    return found


def read_ledger(path: Path) -> LedgerFile:
    """A ledger to look at, also while somebody spends from it.

    Raises:
        PrivacyError: not there, or damaged.
    """
    try:
        return decode_ledger(path.read_bytes(), where=str(path))
    except FileNotFoundError as error:
        raise PrivacyError(f"{path}: there is no privacy ledger: nothing was spent here") from error
    except OSError as error:
        raise PrivacyError(f"{path}: cannot read the privacy ledger: {error.strerror}") from error


def with_release(file: LedgerFile, release: Release, participants: Iterable[str] = ()) -> LedgerFile:
    """The file after a further release.

    Args:
        file: so far.
        release: made now.
        participants: names of those who are in it.
    """
    releases = added(file.releases, release)
    place = [_alone(other) for other in releases].index(_alone(release))
    known = dict(file.participants)
    for name in participants:
        counts = [*known.get(name, ())]
        counts += [0] * (place + 1 - len(counts))
        counts[place] += release.steps
        known[name] = tuple(counts)
    return msgspec.structs.replace(file, releases=releases, participants=known)


def added(releases: Sequence[Release], new: Release) -> tuple[Release, ...]:
    """The releases and one more, alike ones counted together."""
    steps: dict[Release, int] = {}
    for release in (*releases, new):
        steps[_alone(release)] = steps.get(_alone(release), 0) + release.steps
    return tuple(msgspec.structs.replace(key, steps=count) for key, count in steps.items())


def releases_with(file: LedgerFile, name: str) -> tuple[Release, ...]:
    """What somebody was in, without the help of chance: as whoever knows who was drawn sees it.

    Rounds that a participant was not in say nothing of it that the rounds before had not said. So its own cost is
    that of those it was in; sampling, which protects only against those who do not know the sample, is left out.
    """
    return tuple(
        msgspec.structs.replace(release, sampling="none", sampling_rate=1.0, steps=steps)
        for release, steps in zip(file.releases, file.participants.get(name, ()), strict=False)
        if steps
    )


def _alone(release: Release) -> Release:
    return msgspec.structs.replace(release, steps=1)


def _checksum(file: LedgerFile) -> str:
    content = msgspec.json.encode(msgspec.structs.replace(file, checksum=""))
    return hashlib.sha256(b"edgetrain privacy ledger\0" + content).hexdigest()


def _damaged(where: str, why: str) -> PrivacyError:
    return PrivacyError(
        f"{where}: the privacy ledger is damaged ({why}); restore it from a copy. Without it nobody knows what has "
        "been spent, so nothing more is."
    )

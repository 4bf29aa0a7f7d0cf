"""The ledger: what has been spent of a budget, on disk before anything it pays for goes out.

A budget can be lowered, never raised: what was promised when data was first used holds for as long as the file.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.privacy.accountant import Accountant, rdp_accountant
from edgetrain.protocol.privacy.errors import BudgetExhausted, PrivacyError
from edgetrain.protocol.privacy.ledger_file import (
    FORMAT_VERSION,
    LedgerFile,
    added,
    decode_ledger,
    encode_ledger,
    with_release,
)
from edgetrain.protocol.privacy.release import Release


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be spent in all. Infinite epsilon: what is spent is written down, nothing is refused."""

    epsilon: Annotated[float, Meta(gt=0)]
    delta: Annotated[float, Meta(gt=0, lt=1)]


class Ledger:
    """A ledger, locked: nobody else can spend from it meanwhile.

    Args:
        path: the file; made if it is not there.
        owner: whose budget.
        budget: as configured now.
        accountant: works out the cost.

    Raises:
        PrivacyError: in use, damaged, somebody else's, or it promises less than `budget`.
    """

    def __init__(self, path: Path, *, owner: str, budget: Budget, accountant: Accountant = rdp_accountant) -> None:
        self.path = path
        self._accountant = accountant
        self._lock = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(path.name + ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = self._load(owner, budget)
        except BlockingIOError as error:
            self.close()
            raise PrivacyError(f"{path}: somebody else is spending from this privacy ledger") from error
        except OSError as error:
            self.close()
            raise PrivacyError(f"{path}: cannot use the privacy ledger: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def budget(self) -> Budget:
        """What is promised."""
        return Budget(epsilon=self._file.limit, delta=self._file.delta)

    @property
    def releases(self) -> tuple[Release, ...]:
        """All that was released."""
        return self._file.releases

    @property
    def epsilon(self) -> float:
        """Spent so far, at the budget's delta."""
        return self._accountant(self._file.releases, self._file.delta)

    def check(self, release: Release) -> float:
        """What will have been spent after a further release; nothing is spent yet.

        Raises:
            BudgetExhausted: more than the budget.
            PrivacyError: a release that cannot be added to the earlier ones.
        """
        after = self._accountant(added(self._file.releases, release), self._file.delta)
        if after > self.budget.epsilon:
            raise BudgetExhausted(
                f"the privacy budget does not allow it: epsilon would be {after:.4g} of {self.budget.epsilon:.4g} at "
                f"delta {self._file.delta:g} (spent: {self.epsilon:.4g}, in {self.path})"
            )
        return after

    def charge(self, release: Release, participants: Iterable[str] = ()) -> float:
        """Spends; on disk when this returns, so only then may the release go out.

        Args:
            release: to pay for.
            participants: names of those who are in it, whose own costs are kept, too.

        Returns:
            Epsilon spent in all.

        Raises:
            BudgetExhausted: more than the budget. Nothing was spent.
            PrivacyError: the ledger cannot be written; then nothing may be released.
        """
        after = self.check(release)
        self._write(with_release(self._file, release, participants))
        return after

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock:
            self._lock.close()

    def _load(self, owner: str, budget: Budget) -> LedgerFile:
        asked = LedgerFile(
            owner=owner, epsilon=None if math.isinf(budget.epsilon) else budget.epsilon, delta=budget.delta
        )
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            self._write(asked)
            return asked
        found = decode_ledger(data, where=str(self.path))
        if found.owner != owner:
            raise PrivacyError(f"{self.path}: is the privacy ledger of {found.owner!r}, not of {owner!r}")
        if found.epsilon is not None and (budget.epsilon > found.epsilon or budget.delta > found.delta):
            raise PrivacyError(
                f"{self.path}: promises epsilon {found.epsilon:g} at delta {found.delta:g}; the settings ask for "
                f"{budget.epsilon:g} at {budget.delta:g}. A promise can be tightened, not loosened: set epsilon and "
                "delta to at most what was promised."
            )
        if (found.epsilon, found.delta, found.format_version) != (asked.epsilon, asked.delta, FORMAT_VERSION):
            found = msgspec.structs.replace(found, epsilon=asked.epsilon, delta=asked.delta)
            self._write(found)
        return found

    def _write(self, file: LedgerFile) -> None:
        try:
            write_atomically(self.path, encode_ledger(file))
        except OSError as error:
            raise PrivacyError(f"{self.path}: cannot write the privacy ledger: {error}") from error
        self._file = file

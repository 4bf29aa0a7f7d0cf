"""A privacy ledger of the device's own, in the client's state directory.

It holds across rounds, runs, restarts and coordinators. The device trusts nobody with it: it works out by itself what
it is asked for costs, and declines what it cannot afford.
"""

from __future__ import annotations

import math
from pathlib import Path

from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.ledger import Budget, Ledger
from edgetrain.protocol.privacy.release import Release


class DeviceLedger:
    """Made when something is first paid for, or when there is a limit.

    Args:
        path: the file.
        owner: whose budget.
        epsilon: the limit; 0 for none.
        delta: of that.

    Raises:
        PrivacyError: the ledger cannot be used, or promises more than the settings.
    """

    def __init__(self, path: Path, owner: str, *, epsilon: float, delta: float) -> None:
        self._path = path
        self._owner = owner
        self._budget = Budget(epsilon=epsilon or math.inf, delta=delta)
        self._ledger = self._open() if epsilon or path.exists() else None

    @property
    def exists(self) -> bool:
        """Whether anything was ever paid for, or is limited."""
        return self._ledger is not None

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self._ledger.epsilon if self._ledger else 0.0

    def check(self, release: Release | None, *, without_noise: str) -> None:
        """Returns if something can be afforded; before any work on it.

        Args:
            release: what it reveals; None if that is not known, for want of noise.
            without_noise: what to say then, where there is a limit.

        Raises:
            PrivacyError: it cannot, or it has no noise where there is a limit.
        """
        if release is not None:
            self._ledger = self._ledger or self._open()
            self._ledger.check(release)
        elif self._ledger and not math.isinf(self._ledger.budget.epsilon):
            raise PrivacyError(without_noise)

    def charge(self, release: Release | None) -> None:
        """Pays for what was checked and is done; on disk when this returns, so only then may it leave.

        Raises:
            PrivacyError: more than the budget, or the ledger cannot be written. Nothing may leave.
        """
        if release is not None:
            assert self._ledger, "checked first"
            self._ledger.charge(release)

    def close(self) -> None:
        """Lets go of the file."""
        if self._ledger:
            self._ledger.close()

    def _open(self) -> Ledger:
        return Ledger(self._path, owner=self._owner, budget=self._budget)

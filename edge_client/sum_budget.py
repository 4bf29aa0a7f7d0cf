"""The device's own count of what the noisy sums that it is in may reveal about it.

A coordinator keeps the federation's budget, and could go on when it is spent. A device that takes part in secure
aggregation with noise works out by itself what each sum costs it, as if everybody knew that it was in, and declines
what it cannot afford. Kept in the client's state directory, so it holds across rounds, runs, restarts and coordinators.
"""

from __future__ import annotations

import math
from pathlib import Path

from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.ledger import Budget, Ledger
from edgetrain.protocol.secure_aggregation.messages import Settings
from edgetrain.protocol.secure_aggregation.noise import noise_of


class SumBudget:
    """Pays for masked updates.

    Args:
        path: of the ledger; made when something is first spent, or when there is a limit.
        name: of the client.
        epsilon: the limit; 0 for none.
        delta: of that.

    Raises:
        PrivacyError: the ledger cannot be used, or promises more than the settings.
    """

    def __init__(self, path: Path, name: str, *, epsilon: float, delta: float) -> None:
        self._path = path
        self._owner = f"client {name} in sums"
        self._budget = Budget(epsilon=epsilon or math.inf, delta=delta)
        self._ledger = self._open() if epsilon or path.exists() else None

    def check(self, settings: Settings) -> None:
        """Returns if a round can be afforded; before any work on it.

        Raises:
            PrivacyError: it cannot, or it has no noise where there is a limit.
        """
        noise = noise_of(settings)
        if noise is None:
            if self._ledger is not None and not math.isinf(self._ledger.budget.epsilon):
                raise PrivacyError(
                    "this device has a privacy budget for sums and the plan has none of their noise: the federation "
                    "needs secure_aggregation.noise_multiplier"
                )
            return
        self._ledger = self._ledger or self._open()
        self._ledger.check(noise.release)

    def charge(self, settings: Settings) -> None:
        """Pays for a masked update; on disk when this returns, so only then may it leave.

        An attempt that is given up is paid for, too: whether its sum was unmasked is not for the device to see.

        Raises:
            PrivacyError: more than the budget, or the ledger cannot be written. Nothing may leave.
        """
        noise = noise_of(settings)
        if noise is not None:
            assert self._ledger is not None, "checked first"
            self._ledger.charge(noise.release)

    def close(self) -> None:
        """Lets go of the ledger."""
        if self._ledger:
            self._ledger.close()

    def _open(self) -> Ledger:
        return Ledger(self._path, owner=self._owner, budget=self._budget)

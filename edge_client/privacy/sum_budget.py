"""The device's own count of what the noisy sums that it is in may reveal about it.

A coordinator keeps the federation's budget, and could go on when it is spent. A device that takes part in secure
aggregation with noise works out by itself what each sum costs it, as if everybody knew that it was in, and declines
what it cannot afford.
"""

from __future__ import annotations

from pathlib import Path

from edgetrain.edge_client.privacy.device_ledger import DeviceLedger
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.secure_aggregation.messages import Settings
from edgetrain.protocol.secure_aggregation.noise import noise_of


class SumBudget:
    """Pays for masked updates.

    Args:
        path: of the ledger.
        name: of the client.
        epsilon: the limit; 0 for none.
        delta: of that.

    Raises:
        PrivacyError: see `DeviceLedger`.
    """

    def __init__(self, path: Path, name: str, *, epsilon: float, delta: float) -> None:
        self._ledger = DeviceLedger(path, f"client {name} in sums", epsilon=epsilon, delta=delta)

    def check(self, settings: Settings) -> None:
        """Returns if a round can be afforded; before any work on it.

        Raises:
            PrivacyError: it cannot, or it has no noise where there is a limit.
        """
        self._ledger.check(
            _released(settings),
            without_noise="this device has a privacy budget for sums and the plan has none of their noise: the "
            "federation needs secure_aggregation.noise_multiplier",
        )

    def charge(self, settings: Settings) -> None:
        """Pays for a masked update, before it may leave.

        An attempt that is given up is paid for, too: whether its sum was unmasked is not for the device to see.

        Raises:
            PrivacyError: more than the budget, or the ledger cannot be written. Nothing may leave.
        """
        self._ledger.charge(_released(settings))

    def close(self) -> None:
        """Lets go of the ledger."""
        self._ledger.close()


def _released(settings: Settings) -> Release | None:
    noise = noise_of(settings)
    return None if noise is None else noise.release

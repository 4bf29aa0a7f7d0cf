"""The device's own budget: what all trainings together may reveal about one of its samples.

The device works out the cost of a plan by itself and declines what it cannot afford.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.edge_client.privacy.device_ledger import DeviceLedger
from edgetrain.edge_client.training.private_steps import planned_release
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.training import TrainingConfig


class DevicePrivacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[privacy]: of the device's samples."""

    epsilon: Annotated[
        float, Meta(description="largest epsilon that one local sample may ever cost; 0 for no limit", ge=0)
    ] = 0.0
    delta: Annotated[
        float, Meta(description="delta of that budget, well below 1 / number of local samples", gt=0, lt=1)
    ] = 1e-6


class DeviceBudget:
    """Pays for local trainings.

    Args:
        path: of the ledger.
        name: of the client.
        config: the limit.

    Raises:
        PrivacyError: see `DeviceLedger`.
    """

    def __init__(self, path: Path, name: str, config: DevicePrivacy) -> None:
        self._ledger = DeviceLedger(path, f"client {name}", epsilon=config.epsilon, delta=config.delta)

    @property
    def withholds_metrics(self) -> bool:
        """Whether losses and accuracies stay here: they are computed from samples, and no noise covers them."""
        return self._ledger.exists

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self._ledger.epsilon

    def check(self, training: TrainingConfig, num_examples: int) -> None:
        """Returns if a plan can be afforded; before any work on it.

        Raises:
            PrivacyError: it cannot, or it has no noise where there is a limit.
        """
        self._ledger.check(
            _released(training, num_examples),
            without_noise="this device has a privacy budget and the plan has no noise for its samples: the federation "
            "needs [training.privacy]",
        )

    def charge(self, training: TrainingConfig, num_examples: int) -> None:
        """Pays for a training that is done, before its result may leave.

        Raises:
            PrivacyError: more than the budget, or the ledger cannot be written. Nothing may leave.
        """
        self._ledger.charge(_released(training, num_examples))

    def close(self) -> None:
        """Lets go of the ledger."""
        self._ledger.close()


def _released(training: TrainingConfig, num_examples: int) -> Release | None:
    return None if training.privacy is None else planned_release(num_examples, training)

"""The device's own budget: what all trainings together may reveal about one of its samples.

Kept in the client's state directory, so it holds across rounds, runs, restarts and coordinators. The device trusts
nobody with it: it works out the cost of a plan by itself and declines what it cannot afford.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgetrain.edge_client.private_steps import planned_release
from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.ledger import Budget, Ledger
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
        path: of the ledger; made when something is first spent, or when there is a limit.
        name: of the client.
        config: the limit.

    Raises:
        PrivacyError: the ledger cannot be used, or promises more than the settings.
    """

    def __init__(self, path: Path, name: str, config: DevicePrivacy) -> None:
        self._path = path
        self._name = name
        self._config = config
        self._ledger = self._open() if config.epsilon or path.exists() else None

    @property
    def withholds_metrics(self) -> bool:
        """Whether losses and accuracies stay here: they are computed from samples, and no noise covers them."""
        return self._ledger is not None

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self._ledger.epsilon if self._ledger else 0.0

    def check(self, training: TrainingConfig, num_examples: int) -> None:
        """Returns if a plan can be afforded; before any work on it.

        Raises:
            PrivacyError: it cannot, or it has no noise where there is a limit.
        """
        if training.privacy is None:
            if self._ledger is not None and not math.isinf(self._ledger.budget.epsilon):
                raise PrivacyError(
                    "this device has a privacy budget and the plan has no noise for its samples: the federation needs "
                    "[training.privacy]"
                )
            return
        self._ledger = self._ledger or self._open()
        self._ledger.check(planned_release(num_examples, training))

    def charge(self, training: TrainingConfig, num_examples: int) -> None:
        """Pays for a training that is done; on disk when this returns, so only then may its result leave.

        Raises:
            PrivacyError: more than the budget, or the ledger cannot be written. Nothing may leave.
        """
        if training.privacy is not None:
            assert self._ledger is not None, "checked first"
            self._ledger.charge(planned_release(num_examples, training))

    def close(self) -> None:
        """Lets go of the ledger."""
        if self._ledger:
            self._ledger.close()

    def _open(self) -> Ledger:
        budget = Budget(epsilon=self._config.epsilon or math.inf, delta=self._config.delta)
        return Ledger(self._path, owner=f"client {self._name}", budget=budget)

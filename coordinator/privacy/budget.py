"""The federation's budget: no round starts that cannot be paid for, none closes before it has been."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.run.records import RoundRecord
from edgetrain.coordinator.strategies import Strategy, described
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.manifest import STEP_CLIPPED, Manifest
from edgetrain.protocol.privacy.dp_accounting import accountant
from edgetrain.protocol.privacy.errors import BudgetExhausted, PrivacyError
from edgetrain.protocol.privacy.ledger import Budget, Ledger
from edgetrain.protocol.privacy.release import Release


class FederationBudget:
    """Pays for rounds out of a ledger.

    Args:
        ledger: open.
        release: what one round releases.
    """

    def __init__(self, ledger: Ledger, release: Release) -> None:
        self._ledger = ledger
        self._release = release

    @property
    def delta(self) -> float:
        """Of the budget."""
        return self._ledger.budget.delta

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self._ledger.epsilon

    @property
    def mechanism(self) -> str:
        """What a round releases, in words."""
        return self._release.words

    def refusal(self) -> str | None:
        """Why another round cannot be paid for, or None."""
        try:
            self._ledger.check(self._release)
        except BudgetExhausted as error:
            return str(error)
        return None

    def charge(self, participants: Iterable[str]) -> float:
        """Pays for a round; on disk when this returns, so only then may its noisy sum be looked at.

        A crash between this and the end of the round leaves it paid; the round is then closed, and paid, again,
        because its sum has met two different noises.

        Args:
            participants: the clients that are in the sum.

        Returns:
            Epsilon spent in all.

        Raises:
            BudgetExhausted: more than the budget.
            PrivacyError: the ledger cannot be written.
        """
        return self._ledger.charge(self._release, participants)

    def close(self) -> None:
        """Lets go of the ledger."""
        self._ledger.close()


def open_budget(
    config: FederationConfig, strategy: Strategy, records: Sequence[RoundRecord]
) -> FederationBudget | None:
    """The budget of a run, or None where nothing is to be private.

    Args:
        config: the settings.
        strategy: of the run.
        records: of the rounds that have closed.

    Raises:
        ConfigError: settings that give no guarantee.
        PrivacyError: the ledger cannot be used, or promises what these settings would break.
    """
    path = ledger_path(config)
    if strategy.private is None:
        if config.privacy.epsilon:
            raise ConfigError(
                f"[privacy] asks for epsilon {config.privacy.epsilon:g}, but strategy {described(strategy)!r} adds no "
                "noise: use dp-fedavg, alone or within a server optimizer. (To protect samples on their devices, set "
                "[training.privacy], and the budget in each device's settings.)"
            )
        if path.exists() or any(record.epsilon is not None for record in records):
            raise PrivacyError(
                f"{path}: earlier rounds of federation {config.federation!r} ran under a privacy budget; rounds "
                "without noise would break its promise. Use dp-fedavg and [privacy] again, or another federation's "
                "name for other data."
            )
        return None
    _check(config, strategy)
    ledger = Ledger(
        path,
        owner=f"federation {config.federation}",
        budget=Budget(epsilon=config.privacy.epsilon, delta=config.privacy.delta),
        accountant=accountant(config.privacy.accountant),
    )
    try:
        recorded = sum(record.epsilon is not None for record in records)
        if recorded > sum(release.steps for release in ledger.releases):
            raise PrivacyError(
                f"{path}: knows of fewer private rounds than the {recorded} in {config.out}: restore the ledger from "
                "a copy, or set privacy.ledger to where it is"
            )
        ledger.check(strategy.private.release)
    except BudgetExhausted:
        pass  # said before the round
    except BaseException:
        ledger.close()
        raise
    return FederationBudget(ledger, strategy.private.release)


def check_bundle(config: FederationConfig, manifest: Manifest) -> None:
    """Returns if the bundle can do what [training.privacy] asks for.

    Raises:
        ConfigError: no program of it clips by sample.
    """
    if config.training.privacy and not any(STEP_CLIPPED in program.graphs for program in manifest.programs):
        raise ConfigError(
            f"[training.privacy] clips by sample, and bundle {manifest.name!r} was exported without that: export it "
            "with --per-sample-clipping"
        )


def ledger_path(config: FederationConfig) -> Path:
    """Where the federation's ledger is."""
    if config.privacy.ledger:
        return Path(config.privacy.ledger)
    return Path(config.out).absolute().parent / f"privacy-{config.federation}.json"


def _check(config: FederationConfig, strategy: Strategy) -> None:
    """Refuses settings with which the numbers in the ledger would mean nothing."""
    assert strategy.private is not None, "asked for"
    name = described(strategy)
    sampling = strategy.private.release.sampling
    if not config.privacy.epsilon:
        raise ConfigError(f"strategy {name!r} needs a budget: set privacy.epsilon and privacy.delta")
    if config.selection.method == "utility":
        raise ConfigError(
            'selection.method = "utility" chooses clients by their training loss, which no noise covers: use another'
        )
    if config.stop.metric.startswith("clients.") or config.stop.metric == "train_loss":
        raise ConfigError(
            f"stop.metric = {config.stop.metric!r} decides by what clients measure on their own data, which no noise "
            'covers: use "loss" or "accuracy" on held-out data'
        )
    if sampling != "none" and config.rounds.over_selection > 1:
        raise ConfigError(
            f"sampling = {sampling!r} counts on chance alone to choose clients, but rounds.over_selection = "
            f"{config.rounds.over_selection:g} keeps the fastest: set it to 1"
        )

"""Accounting by Google's dp-accounting, where it is installed: privacy loss distributions, which are tighter.

`pip install 'edgetrain[privacy]'`. Used by choice (`accountant = "pld"`); nothing needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

from edgetrain.protocol.privacy.accountant import Accountant, rdp_accountant
from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.release import Release

AccountantName = Literal["rdp", "pld", "dp-accounting-rdp"]


def accountant(name: AccountantName) -> Accountant:
    """An accountant by name: our own ("rdp"), or one of dp-accounting's.

    Raises:
        PrivacyError: dp-accounting is not installed.
    """
    if name == "rdp":
        return rdp_accountant
    try:
        library = importlib.import_module("dp_accounting")
        parts = importlib.import_module(f"dp_accounting.{'pld' if name == 'pld' else 'rdp'}")
    except ImportError as error:
        raise PrivacyError(f"accountant {name!r} needs dp-accounting: pip install 'edgetrain[privacy]'") from error
    kind = parts.PLDAccountant if name == "pld" else parts.RdpAccountant

    def epsilon(releases: Sequence[Release], delta: float) -> float:
        if not releases:
            return 0.0
        replace = {release.relation for release in releases} == {"replace"}
        relation = library.NeighboringRelation
        made = kind(neighboring_relation=relation.REPLACE_ONE if replace else relation.ADD_OR_REMOVE_ONE)
        for release in releases:
            event = event_of(library, release)
            if not made.supports(event):
                raise PrivacyError(
                    f"accountant {name!r} knows no {release.mechanism} with sampling {release.sampling!r}"
                )
            made.compose(event, release.steps)
        return float(made.get_epsilon(delta))

    return epsilon


def event_of(library: Any, release: Release) -> Any:
    """A release in the words of dp-accounting.

    Raises:
        PrivacyError: it has no word for it.
    """
    if release.mechanism != "gaussian":
        raise PrivacyError(f"dp-accounting knows no {release.mechanism} noise: use accountant 'rdp'")
    event = library.GaussianDpEvent(release.noise_multiplier)
    if release.sampling == "poisson":
        return library.PoissonSampledDpEvent(release.sampling_rate, event)
    if release.sampling == "fixed":
        # Only the ratio counts.
        population = 10**9
        return library.SampledWithoutReplacementDpEvent(population, round(population * release.sampling_rate), event)
    return event

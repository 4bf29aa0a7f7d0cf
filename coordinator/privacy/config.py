"""Settings of the federation's privacy budget."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


class PrivacyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[privacy]: what all rounds together may reveal about one client. Needs a private strategy (dp-fedavg)."""

    # Largest epsilon, over all runs that share the ledger; 0 for no differential privacy.
    epsilon: Annotated[float, Meta(ge=0)] = 0.0
    # Of the budget: well below 1 / number of clients.
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-6
    # The ledger's file. It should outlive a run: by default it is privacy-FEDERATION.json beside the run directory.
    ledger: str = ""
    # rdp: our own. pld, dp-accounting-rdp: by dp-accounting, if it is installed; pld is the tightest.
    accountant: Literal["rdp", "pld", "dp-accounting-rdp"] = "rdp"

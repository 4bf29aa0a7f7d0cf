"""Settings of secure aggregation: `[secure_aggregation]`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgetrain.protocol.secure_aggregation.messages import MAX_NEIGHBOURS


class SecureAggregationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[secure_aggregation]: the coordinator sees sums of updates only, see docs/secure-aggregation.md."""

    enabled: bool = False
    # What the choice of neighbours is made for: shares of the clients that may drop out in the middle, and that
    # may collude with the coordinator; and whether the coordinator may lie to clients, or only be curious.
    max_dropout: Annotated[float, Meta(ge=0, lt=0.5)] = 0.2
    max_colluding: Annotated[float, Meta(ge=0, lt=0.5)] = 0.1
    server_may_lie: bool = True
    # Instead of that choice: neighbours of each client (even), and holders that it takes to get a secret back.
    neighbours: Annotated[int, Meta(ge=0, le=MAX_NEIGHBOURS)] = 0
    threshold: Annotated[int, Meta(ge=0, le=MAX_NEIGHBOURS + 1)] = 0
    # Clients have so long for each step after training.
    phase_seconds: Annotated[float, Meta(gt=0)] = 30.0
    # How clients count: by their numbers of examples, which are summed under the mask, too, or all the same.
    weighting: Literal["examples", "equal"] = "examples"
    # Values beyond this (weighted) are clipped and sent in a later round; the first round's, if it adapts.
    value_range: Annotated[float, Meta(gt=0)] = 0.05
    # Fit the range to the values: how many lie in which octave is summed under the mask, too.
    adapt_range: bool = True
    # Most bits of a summed value, without noise: where many clients would take more, each writes coarser integers
    # instead (the mean of many is as fine again). 0: as the codec says, whatever it takes.
    max_bits: Annotated[int, Meta(ge=0, le=64)] = 14
    # Share of the values that may lie beyond it.
    clipped: Annotated[float, Meta(ge=0, lt=1)] = 0.001
    # The parameters that a round sums: random ones, or the largest of the last sum and for the rest random ones.
    support: Literal["random", "last-sum"] = "random"
    # last-sum: share of the support that is random, so that every parameter has its turn.
    explore: Annotated[float, Meta(gt=0, le=1)] = 0.5
    # Clients scale what they send down to this L2 norm, and so does the coordinator with the mean; 0 for no limit.
    max_norm: Annotated[float, Meta(ge=0)] = 0.0
    # Differential privacy of clients, also from the coordinator: deviation of the noise that all add together, in
    # `max_norm`; 0 for none. Needs a budget in [privacy].
    noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    noise: Literal["discrete-gaussian", "skellam"] = "discrete-gaussian"
    # What chance does for the budget, as with dp-fedavg. poisson: each of the population takes part with probability
    # rounds.goal / population. fixed: a random subset of that size. It protects from those who do not know who was
    # drawn; the coordinator does, and so do the clients of the same round.
    sampling: Literal["none", "poisson", "fixed"] = "none"
    # Clients that could be drawn, for poisson and fixed.
    population: Annotated[int, Meta(ge=0)] = 0

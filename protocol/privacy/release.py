"""What is released under differential privacy: data that accountants interpret and ledgers keep."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Mechanism = Literal["gaussian", "discrete-gaussian", "skellam"]
Sampling = Literal["none", "poisson", "fixed"]


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So many noisy sums, all made alike.

    Who is a neighbour of whom follows from the sampling. With "none" and "poisson", two data sets are neighbours
    if one has one more person (add or remove), so the sensitivity of a sum of vectors clipped to C is C. With
    "fixed", one person is replaced by another, and the sensitivity is 2 C.
    """

    mechanism: Mechanism = "discrete-gaussian"
    # Standard deviation of the noise in the sum, divided by the L2 sensitivity of the sum.
    noise_multiplier: Annotated[float, Meta(gt=0)]
    # Who takes part. none: anybody may. poisson: each independently with `sampling_rate`. fixed: a uniformly random
    # subset, `sampling_rate` of all, without replacement.
    sampling: Sampling = "none"
    sampling_rate: Annotated[float, Meta(gt=0, le=1)] = 1.0
    # The rest is for noise on a coarse grid: skellam, and a discrete Gaussian that is made of several.
    # L2 sensitivity in steps of the grid, and the number of elements of the sum.
    l2_sensitivity: Annotated[float, Meta(ge=0)] = 0.0
    dimension: Annotated[int, Meta(ge=0)] = 0
    # Independent shares that the noise is the sum of, of equal variance.
    shares: Annotated[int, Meta(ge=1)] = 1
    # How many such sums.
    steps: Annotated[int, Meta(ge=1, le=2**53)] = 1

    @property
    def relation(self) -> Literal["add-or-remove", "replace"]:
        """Which data sets are neighbours."""
        return "replace" if self.sampling == "fixed" else "add-or-remove"

    @property
    def sensitivity_per_clip_norm(self) -> float:
        """L2 sensitivity of a sum of vectors that are clipped to norm 1."""
        return 2.0 if self.sampling == "fixed" else 1.0

    @property
    def words(self) -> str:
        """What it is, for people."""
        noise = f"{self.mechanism} noise, multiplier {self.noise_multiplier:.6g}"
        if self.sampling == "none":
            return noise
        return f"{noise}, {self.sampling} sampling, rate {self.sampling_rate:.6g}"

"""Noise that nobody adds alone: every client adds a share to its integers before they are masked.

The server then sees only a sum that is private already. Shares are sized for the fewest clients that a sum may come
from, so dropouts leave too much noise, never too little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.noise import Noise, discrete_gaussian, largest, skellam
from edgetrain.protocol.privacy.release import Release


@dataclass(frozen=True, slots=True)
class DistributedNoise:
    """One client's share, and what the sum of enough of them releases."""

    # `share(random_bytes, size)` -> int64 [size], in steps of the quantizer.
    share: Noise
    # Of one share, in steps.
    share_deviation: float
    # No share is larger in magnitude, in steps: for the modulus of secure aggregation.
    bound: int
    # For the ledger, without sampling.
    release: Release


def distributed_noise(
    mechanism: Literal["discrete-gaussian", "skellam"],
    *,
    noise_multiplier: float,
    l2_steps: float,
    dimension: int,
    clients: int,
) -> DistributedNoise:
    """Shares of noise for a sum of integer vectors.

    Discrete Gaussian shares: Kairouz, Liu and Steinke 2021; Skellam shares: Agarwal, Kairouz and Liu 2021.

    Args:
        mechanism: of the shares.
        noise_multiplier: standard deviation of the whole noise divided by `l2_steps`.
        l2_steps: L2 norm that no client's integer vector exceeds, in steps: after clipping *and* rounding, see
            `clipping.clip_to_grid`.
        dimension: elements of the vector.
        clients: fewest that a sum is ever opened for: the threshold of secure aggregation.

    Raises:
        PrivacyError: the grid is too fine or too coarse for the noise.
    """
    if clients < 1 or l2_steps <= 0 or dimension < 1:
        raise PrivacyError("distributed noise needs at least one client, one element and a positive norm")
    deviation = noise_multiplier * l2_steps / math.sqrt(clients)
    if mechanism == "discrete-gaussian" and deviation < 0.5:
        raise PrivacyError(
            f"discrete Gaussian shares of deviation {deviation:.3g} steps are too fine: at least 0.5 is needed. Use a "
            "finer quantizer or skellam noise"
        )
    kind = discrete_gaussian if mechanism == "discrete-gaussian" else skellam
    return DistributedNoise(
        share=kind(deviation),
        share_deviation=deviation,
        bound=largest(kind, deviation),
        release=Release(
            mechanism=mechanism,
            noise_multiplier=noise_multiplier,
            l2_sensitivity=l2_steps,
            dimension=dimension,
            shares=clients,
        ),
    )

"""Every client's share of noise, so that a sum is private before anyone sees it.

A share is sized for the fewest honest clients that a sum may come from; what more there are, and what colluding ones
add, makes the sum noisier. See `protocol.privacy.distributed`.
"""

from __future__ import annotations

import math

import numpy as np

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.privacy.distributed import DistributedNoise, distributed_noise
from edgetrain.protocol.privacy.randomness import RandomBytes
from edgetrain.protocol.secure_aggregation.arithmetic import Integers, Noise
from edgetrain.protocol.secure_aggregation.messages import Settings

# No share is larger than so many deviations, and a little: the Gaussian's tail is cut at 13.5, and beyond this bound
# a Skellam share falls with a chance below 2^-100, where it is cut, too.
_REACH, _MARGIN = 20, 64


def noise_of(settings: Settings) -> DistributedNoise | None:
    """The noise of a round, or None.

    Raises:
        PrivacyError: the grid is too fine or too coarse for it.
    """
    if not settings.noise_multiplier:
        return None
    return distributed_noise(
        settings.noise,
        noise_multiplier=settings.noise_multiplier,
        l2_steps=settings.max_norm / settings.quantizer.step,
        dimension=settings.count,
        clients=settings.noise_shares,
    )


def noise_bound(noise: DistributedNoise) -> int:
    """No share is larger in magnitude."""
    return math.ceil(_REACH * noise.share_deviation) + _MARGIN


def share_of(settings: Settings, random_bytes: RandomBytes) -> Noise | None:
    """What draws a client's share, or None.

    Raises:
        PrivacyError: see `noise_of`.
        SecureAggregationError: the round has no room for it, so there would be less noise than it says.
    """
    noise = noise_of(settings)
    if noise is None:
        return None
    draw, bound = noise.share, settings.quantizer.noise_bound
    if bound < noise_bound(noise):
        raise SecureAggregationError(f"noise of up to {noise_bound(noise)} steps would be cut to {bound}")

    def share(count: int) -> Integers:
        return np.clip(draw(random_bytes, count), -bound, bound)

    return share

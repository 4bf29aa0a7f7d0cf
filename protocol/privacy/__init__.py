"""Differential privacy: what both ends need to know of it. Numpy and the standard library only, but for ChaCha20.

`release` says what was released, `accountant` what that costs, `calibrate` how much noise a budget needs, `noise`
makes it, `ledger` remembers it.
"""

from edgetrain.protocol.privacy.accountant import spent
from edgetrain.protocol.privacy.errors import BudgetExhausted, PrivacyError
from edgetrain.protocol.privacy.noise import Noise, discrete_gaussian, rounded_gaussian, skellam
from edgetrain.protocol.privacy.randomness import Keystream, RandomBytes
from edgetrain.protocol.privacy.release import Release

__all__ = [
    "BudgetExhausted",
    "Keystream",
    "Noise",
    "PrivacyError",
    "RandomBytes",
    "Release",
    "discrete_gaussian",
    "rounded_gaussian",
    "skellam",
    "spent",
]

"""The exceptions of differential privacy.

EdgetrainError
└── PrivacyError           settings that give no guarantee, or none that can be computed
    └── BudgetExhausted    what is asked for would spend more than the budget
"""

from edgetrain.protocol.errors import EdgetrainError


class PrivacyError(EdgetrainError):
    """Settings that give no privacy guarantee, or none that can be computed; or a ledger that is damaged."""


class BudgetExhausted(PrivacyError):
    """What is asked for would spend more than the budget; nothing was spent."""

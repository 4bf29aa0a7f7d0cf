"""The exceptions of `edgetrain.models`.

EdgetrainError
└── ModelError   an unknown model or data set, an option it does not take, or data that cannot be made
"""

from edgetrain.protocol.errors import EdgetrainError


class ModelError(EdgetrainError, ValueError):
    """An unknown model or data set, an option that it does not take, or data that cannot be made."""

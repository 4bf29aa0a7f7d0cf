"""The exceptions of `edgetrain.coordinator`.

EdgetrainError
└── CoordinatorError
    ├── RunError        the run directory is of another run, in use, damaged or cannot be written
    ├── RoundFailed     too few clients, too often
    ├── StopRequested   somebody asked the run to stop
    ├── UpdateRefused   an update that must not be folded; only its sender hears of it
    └── BrokerError     a broker that should be started could not be
"""

from edgetrain.protocol.errors import EdgetrainError


class CoordinatorError(EdgetrainError):
    """Root of the coordinator's errors."""


class RunError(CoordinatorError):
    """The run directory belongs to another run, is in use, damaged, or cannot be written."""


class RoundFailed(CoordinatorError):
    """A round did not reach its minimum, more often than allowed."""


class UpdateRefused(CoordinatorError):
    """An update that must not be folded; the message is the reason that its sender is told."""


class StopRequested(CoordinatorError):
    """Somebody asked the run to stop."""


class BrokerError(CoordinatorError):
    """The broker that should be started with the coordinator could not be."""

"""The exceptions of `edgetrain.edge_client`.

EdgetrainError
└── ClientError
    ├── SessionError   a runtime is missing, or a bundle does not run on it
    ├── DataError      local data that does not fit the bundle
    ├── TrainingError  a loss or gradient that is not finite
    ├── StateError     the client's own directory cannot be read or written
    └── RefusedError   the coordinator will not have this client
"""

from edgetrain.protocol.errors import EdgetrainError


class ClientError(EdgetrainError):
    """Root of the client's errors."""


class SessionError(ClientError):
    """A runtime is not installed or too old, or a bundle does not run on it."""


class DataError(ClientError, ValueError):
    """Local data, or a batch, that does not fit the bundle: shape, dtype, NaN, nothing at all."""


class TrainingError(ClientError):
    """Training went astray: a loss or a gradient is not finite."""


class StateError(ClientError):
    """The client's state directory cannot be read or written."""


class RefusedError(ClientError):
    """The coordinator refused this client for good, e.g. because its versions do not fit."""

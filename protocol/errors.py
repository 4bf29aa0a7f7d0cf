"""The exceptions of `edgetrain.protocol`, and the root of all others.

    EdgetrainError
    ├── ConfigError        a configuration file or flag is wrong
    ├── BundleError        a bundle is missing, corrupt or of another version
    ├── CodecError         bytes that no encoder of ours writes, or that exceed the limits
    ├── MessageError       a message that does not decode or breaks its schema
    ├── SignatureError     a message that its claimed sender did not sign
    ├── BlobError          a blob whose chunks do not add up to its digest
    ├── TransportError     the broker cannot be reached, or closed the door
    └── SecureAggregationError   a step of secure aggregation that would give something away, or cannot be done
    (edge_client, coordinator and export add their own branches)

A message says what was wrong, where, and what to do. The command line prints it as it is.
"""


class EdgetrainError(Exception):
    """Root of every error that edgetrain raises on purpose."""


class ConfigError(EdgetrainError):
    """A configuration file, an environment variable or a flag is wrong."""


class BundleError(EdgetrainError):
    """A bundle is missing, corrupt, or was written by another version."""


class CodecError(EdgetrainError, ValueError):
    """Bytes that no encoder writes, a spec that names no codec, or a count beyond the limits."""


class MessageError(EdgetrainError, ValueError):
    """A message that does not decode, or that breaks its schema."""


class SignatureError(MessageError):
    """A message that its claimed sender did not sign."""


class BlobError(EdgetrainError, ValueError):
    """Chunks that do not add up to the blob that was announced."""


class TransportError(EdgetrainError):
    """The broker cannot be reached, refused the connection, or closed it for good."""


class SecureAggregationError(EdgetrainError, ValueError):
    """A step of secure aggregation that would give something away, or that cannot be done; nothing was revealed."""

"""What both ends share: manifest, messages, topics, codecs, chunks, signatures, transport.

Imports no torch and nothing of the other packages.
"""

from edgetrain.protocol.codecs import CodecSpec, Limits, SparseOrDense, decode, encode
from edgetrain.protocol.errors import (
    BlobError,
    BundleError,
    CodecError,
    ConfigError,
    EdgetrainError,
    MessageError,
    SignatureError,
    TransportError,
)
from edgetrain.protocol.manifest import Manifest

__all__ = [
    "BlobError",
    "BundleError",
    "CodecError",
    "CodecSpec",
    "ConfigError",
    "EdgetrainError",
    "Limits",
    "Manifest",
    "MessageError",
    "SignatureError",
    "SparseOrDense",
    "TransportError",
    "decode",
    "encode",
]

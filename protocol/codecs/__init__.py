"""Codecs: a delta as few bytes, and back.

A codec is a pipeline of stages, named by a string (`CodecSpec`):

    select (dense, topk, randk, threshold) | quantize (float32, float16, int8, int4, sign, ternary)
    | index coding (rice, raw) | value coding (huffman, packed) | zstd

The payload describes itself; `docs/codecs.md` gives every bit of it for decoders in other languages.
"""

from edgetrain.protocol.codecs.feedback import received, residual
from edgetrain.protocol.codecs.layout import Encoding, begin_encoding, decode, encode
from edgetrain.protocol.codecs.negotiate import negotiate
from edgetrain.protocol.codecs.result import Limits, SparseOrDense
from edgetrain.protocol.codecs.spec import CodecSpec, supported_stages

__all__ = [
    "CodecSpec",
    "Encoding",
    "Limits",
    "SparseOrDense",
    "begin_encoding",
    "decode",
    "encode",
    "negotiate",
    "received",
    "residual",
    "supported_stages",
]

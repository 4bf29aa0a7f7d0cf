"""The optional last stage: zstd, from the standard library (Python 3.14) or `backports.zstd`.

Negotiated and never required: no default codec names it.
"""

from __future__ import annotations

import importlib
from typing import Any

from edgetrain.protocol.errors import CodecError

_LEVEL = 9
# The decoder's window: what an 8 MiB frame needs, and the most memory that a hostile frame header can claim.
_WINDOW_LOG = 23


def _find() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


_zstd = _find()


def available() -> bool:
    """True if zstd can be used here."""
    return _zstd is not None


def compress(data: bytes) -> bytes:
    """One zstd frame."""
    parameter = _require().CompressionParameter
    options = {parameter.compression_level: _LEVEL, parameter.window_log: _WINDOW_LOG}
    return bytes(_require().compress(data, options=options))


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """The inverse; never more than `size` bytes are produced.

    Raises:
        CodecError: no zstd here, not one whole frame, or not exactly `size` bytes.
    """
    zstd = _require()
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
    try:
        out = bytes(decompressor.decompress(data, max_length=size + 1))
    except (zstd.ZstdError, EOFError) as error:
        raise CodecError(f"the zstd stage does not decompress: {error}") from error
    if len(out) != size or not decompressor.eof or decompressor.unused_data:
        raise CodecError(f"the zstd stage does not hold exactly {size} bytes")
    return out


def _require() -> Any:
    if _zstd is None:
        raise CodecError(
            "this codec uses zstd, which is not installed here: pip install backports.zstd, or choose a "
            "codec without it"
        )
    return _zstd

"""Agreeing on a codec with a peer that may not know every stage."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from edgetrain.protocol.codecs.spec import CodecSpec
from edgetrain.protocol.errors import CodecError


def negotiate(spec: CodecSpec, stages: Collection[str]) -> CodecSpec:
    """The nearest codec to `spec` that a peer with these stages can handle.

    Stages that only save bytes give way first (zstd, huffman, rice); then the quantization falls back to
    float32 and the selection to dense.

    Args:
        spec: what we would like.
        stages: names that the peer knows, as from `supported_stages`.

    Raises:
        CodecError: the peer does not even know dense float32.
    """
    if spec.zstd and "zstd" not in stages:
        spec = replace(spec, zstd=False)
    if spec.values == "huffman" and "huffman" not in stages:
        spec = replace(spec, values="packed")
    if spec.index == "rice" and "rice" not in stages:
        spec = replace(spec, index="raw")
    if spec.select not in stages:
        quantize = "sign" if spec.quantize == "ternary" else spec.quantize
        spec = replace(spec, select="dense", amount=None, per_tensor=False, quantize=quantize)
    if not spec.stages <= set(stages):
        spec = replace(spec, quantize="float32", stochastic=False)
    if not spec.stages <= set(stages):
        spec = CodecSpec()
    if not spec.stages <= set(stages):
        raise CodecError(f"the peer lacks codec stages that everyone has: {sorted(spec.stages - set(stages))}")
    return spec

"""Agreeing on a codec with a peer that knows fewer stages."""

import pytest

from edgetrain.protocol import CodecError
from edgetrain.protocol.codecs import CodecSpec, negotiate, supported_stages

EVERYTHING = supported_stages() | {"zstd"}


@pytest.mark.parametrize(
    ("spec", "missing", "expected"),
    [
        ("topk:0.01|int8|rice|huffman|zstd", set(), "topk:0.01|int8:block=256|rice|huffman|zstd"),
        ("topk:0.01|int8|rice|huffman|zstd", {"zstd"}, "topk:0.01|int8:block=256|rice|huffman"),
        ("topk:0.01|int8|rice|huffman", {"huffman"}, "topk:0.01|int8:block=256|rice|packed"),
        ("topk:0.01|int8|rice|huffman", {"rice", "huffman"}, "topk:0.01|int8:block=256|raw|packed"),
        ("topk:0.01|int8|rice|huffman", {"topk"}, "dense|int8:block=256|huffman"),
        ("topk:0.01|int8:stochastic|rice", {"int8"}, "topk:0.01|float32|rice"),
        ("topk:0.01|ternary", {"topk"}, "dense|sign:block=all"),
        ("topk:0.01|ternary", {"topk", "sign"}, "dense|float32"),
        ("dense|float32", {"topk", "int8", "rice", "huffman", "zstd"}, "dense|float32"),
    ],
)
def test_falls_back_to_what_the_peer_knows(spec, missing, expected):
    agreed = negotiate(CodecSpec.parse(spec), EVERYTHING - missing)
    assert str(agreed) == expected
    assert agreed.stages <= EVERYTHING - missing


def test_a_peer_without_the_simplest_codec_is_an_error():
    with pytest.raises(CodecError, match="everyone has"):
        negotiate(CodecSpec.parse("topk:0.01|int8"), set())

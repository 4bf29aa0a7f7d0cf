"""Properties that hold for every vector and every spec, and for every sequence of bytes."""

from __future__ import annotations

import contextlib
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgetrain.protocol import CodecError, CodecSpec, Limits, decode, encode
from edgetrain.protocol.codecs import begin_encoding, residual, supported_stages, wrap
from edgetrain.protocol.codecs.bits import Reader
from edgetrain.protocol.codecs.huffman import code_lengths, decode_symbols, encode_symbols
from edgetrain.protocol.codecs.rice import decode_positions, encode_positions
from support import codec_reference

VECTORS = Path(__file__).parent.parent / "vectors" / "codecs"
SELECTS = [
    "dense",
    "topk:0.1",
    "topk:1.0",
    "topk:5",
    "topk:0.3:per=tensor",
    "randk:0.2",
    "randk:9",
    "threshold:0",
    "threshold:0.01",
]
QUANTIZERS = [
    "float32",
    "float16",
    "int8",
    "int8:block=3",
    "int8:block=all:stochastic",
    "int4:block=tensor",
    "int4:block=16:stochastic",
    "sign:block=7",
    "sign:block=tensor",
    "ternary",
]
FINITE = {"allow_nan": False, "allow_infinity": False, "width": 32}
# Mostly zeros and ties; the last two sit at the threshold above, and below the normal floats.
COARSE = [0.0, 0.0, 0.0, 0.0, 1.0, -1.0, float(np.float32(0.01)), float(np.float32(1e-40))]
vectors = st.one_of(
    hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(**FINITE)),
    hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.float32, st.integers(0, 300), elements=st.sampled_from(COARSE)),
)


@st.composite
def specs(draw):
    select = draw(st.sampled_from(SELECTS))
    stages = [select, draw(st.sampled_from(QUANTIZERS[: -1 if select == "dense" else None]))]
    stages += draw(st.sampled_from([[], ["rice"], ["raw"]])) + draw(st.sampled_from([[], ["packed"]]))
    if "zstd" in supported_stages():
        stages += draw(st.sampled_from([[], ["zstd"]]))
    return "|".join(stages)


@st.composite
def encoded(draw):
    """A vector, a spec and the payload; of what encode refuses there is nothing to decode."""
    delta, spec, seed = draw(vectors), draw(specs()), draw(st.integers(0, 2**64 - 1))
    offsets = [0, 0, len(delta) // 3, len(delta) // 2]
    if len(delta) and np.abs(delta).max() > 60000:
        # Huge values may be refused, and then there is nothing to decode.
        with contextlib.suppress(CodecError):
            return delta, spec, offsets, encode(delta, spec, seed=seed, offsets=offsets)
        delta, offsets = delta[:0], [0]
    return delta, spec, offsets, encode(delta, spec, seed=seed, offsets=offsets)


@given(vectors, specs(), st.integers(0, 2**64 - 1))
@settings(max_examples=300, deadline=None)
def test_what_is_restored_is_what_is_decoded(delta, spec, seed):
    offsets = [0, 0, len(delta) // 3, len(delta) // 2]
    try:
        payload = encode(delta, spec, seed=seed, offsets=offsets)
    except CodecError as error:
        with pytest.raises(CodecError, match=re.escape(str(error))):
            begin_encoding(delta, spec, seed=seed, offsets=offsets).payload()
        return
    encoding = begin_encoding(delta, spec, seed=seed, offsets=offsets)
    restored = encoding.restored()
    decoded = decode(payload, Limits(max_parameters=len(delta)))
    assert (encoding.payload(), restored.num_parameters) == (payload, decoded.num_parameters)
    assert restored.values.tobytes() == decoded.values.tobytes()
    assert restored.values.dtype == np.float32
    assert not np.shares_memory(restored.values, delta)
    assert (restored.indices is None) == (decoded.indices is None)
    if restored.indices is not None:
        np.testing.assert_array_equal(restored.indices, decoded.indices)


def blocks_of(spec, sent, positions, offsets):
    """Block number of each sent value, computed the obvious way."""
    if spec.block == "tensor":
        return [sum(offset <= position for offset in offsets) for position in positions]
    size = len(sent) if spec.block == "all" else spec.block
    return [i // size for i in range(len(sent))]


@given(encoded())
@settings(max_examples=300, deadline=None)
def test_errors_stay_within_the_stated_bounds(case):
    delta, text, offsets, payload = case
    spec = CodecSpec.parse(text)
    decoded = decode(payload, Limits(max_parameters=len(delta)))
    assert decoded.num_parameters == len(delta)
    positions = np.arange(len(delta)) if decoded.indices is None else decoded.indices
    sent, got = delta[positions].astype(np.float64), decoded.values.astype(np.float64)
    assert np.isfinite(got).all()
    if not len(sent):
        return
    if spec.quantize == "float32":
        np.testing.assert_array_equal(got, sent)
        return
    if spec.quantize == "float16":
        np.testing.assert_array_equal(got, sent.astype(np.float16))
        return
    blocks = np.array(blocks_of(spec, sent, positions.tolist(), offsets))
    for block in np.unique(blocks):
        here, back = sent[blocks == block], got[blocks == block]
        if spec.quantize in ("sign", "ternary"):
            mean = np.abs(here).mean()
            np.testing.assert_allclose(np.abs(back), mean, rtol=2**-8, atol=2**-133)
            np.testing.assert_array_equal((back < 0)[back != 0], (here < 0)[back != 0])
        else:
            largest = 127 if spec.quantize == "int8" else 7
            # bfloat16 rounds the scale up by at most one part in 128, or to its smallest value.
            scale = max(np.abs(here).max() / largest * (1 + 2**-7), 2**-133 if here.any() else 0)
            bound = scale * (1 if spec.stochastic else 0.5) * (1 + 1e-5)
            assert np.abs(back - here).max() <= bound


@given(encoded())
@settings(max_examples=200, deadline=None)
def test_selection_takes_what_it_says(case):
    delta, text, offsets, payload = case
    spec = CodecSpec.parse(text)
    indices = decode(payload, Limits(max_parameters=len(delta))).indices
    if spec.select == "dense":
        assert indices is None
        return
    assert (np.diff(indices) > 0).all()
    size = len(delta)
    if spec.select == "randk":
        count = min(size, spec.amount if isinstance(spec.amount, int) else max(1, round(spec.amount * size)))
        assert len(indices) == count
        return
    if spec.select == "threshold":
        np.testing.assert_array_equal(indices, np.flatnonzero(np.abs(delta.astype(np.float64)) > spec.amount))
        return
    spans = [(0, size)]
    if spec.per_tensor:
        spans = list(zip(offsets, [*offsets[1:], size], strict=True))
    expected = []
    for start, stop in spans:
        count = spec.amount if isinstance(spec.amount, int) else max(1, round(spec.amount * (stop - start)))
        # sorted() is stable: of equal magnitudes the first come first.
        ranked = sorted(range(start, stop), key=lambda i: -abs(float(delta[i])))
        expected += sorted(i for i in ranked[:count] if delta[i] != 0)
    assert indices.tolist() == expected


@given(encoded())
@settings(max_examples=150, deadline=None)
def test_the_scalar_decoder_sees_the_same(case):
    delta, _, _, payload = case
    expected = codec_reference.decode(payload, wrap.decompress)
    seen = decode(payload, Limits(max_parameters=len(delta))).dense()
    np.testing.assert_array_equal(seen, np.array(expected, np.float32))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(residual(delta, payload), delta - seen)


@given(encoded(), st.data())
@settings(max_examples=500, deadline=None)
def test_mutated_payloads_raise_nothing_but_codec_errors(case, data):
    delta, _, _, payload = case
    limits = Limits(max_parameters=len(delta) + data.draw(st.integers(0, 200)))
    mutated = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        if not mutated:
            break
        position = data.draw(st.integers(0, len(mutated) - 1))
        action = data.draw(st.sampled_from(["set", "flip", "cut", "insert"]))
        if action == "set":
            mutated[position] = data.draw(st.integers(0, 255))
        elif action == "flip":
            mutated[position] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del mutated[position:]
        else:
            mutated[position:position] = data.draw(st.binary(min_size=1, max_size=8))
    check_hostile(bytes(mutated), limits)


@given(st.binary(max_size=200), st.integers(0, 0x4F), st.integers(0, 0x1F))
@settings(max_examples=500, deadline=None)
def test_random_bytes_raise_nothing_but_codec_errors(body, first, second):
    check_hostile(bytes([0xE7, 1, first, second]) + body, Limits(max_parameters=5000))


def check_hostile(payload, limits):
    try:
        decoded = decode(payload, limits)
    except CodecError:
        return
    assert decoded.num_parameters <= limits.max_parameters
    assert np.isfinite(decoded.values).all()
    assert decoded.dense().shape == (decoded.num_parameters,)


@pytest.mark.parametrize("name", ["topk-int8", "dense-int8-sparse", "dense-int4-huffman", "topk-int8-tensors"])
def test_every_truncation_is_refused(name):
    payload = (VECTORS / f"{name}.payload").read_bytes()
    for length in range(len(payload)):
        with pytest.raises(CodecError):
            decode(payload[:length], Limits(max_parameters=1203))


def varint(value):
    return bytes([value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14 & 0x7F | 0x80, value >> 21])


BILLION = varint(100_000_000)
BOMBS = {
    "dense float32": b"\xe7\x01\x00\x00" + BILLION,
    "dense int8": b"\xe7\x01\x20\x00" + BILLION + BILLION,
    "constant Huffman": b"\xe7\x01\x20\x01" + BILLION + BILLION + b"\x80\x3f\x05\x00",
    "sparse Huffman": b"\xe7\x01\x20\x02" + BILLION + BILLION + b"\x80\x3f" + BILLION,
    "seeded": b"\xe7\x01\x03\x00" + BILLION + BILLION + bytes(8),
    "Rice": b"\xe7\x01\x01\x00" + BILLION + BILLION + b"\x00\x00",
    "raw": b"\xe7\x01\x02\x00" + BILLION + BILLION,
    "many blocks": b"\xe7\x01\x20\x00" + BILLION + b"\x01",
}


def peak_bytes(payload, limits):
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(payload, limits)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_counts_beyond_the_limit_take_no_memory(name):
    assert peak_bytes(BOMBS[name], Limits(max_parameters=99_999_999)) < 20_000


@pytest.mark.parametrize("name", BOMBS)
def test_counts_within_the_limit_take_no_more_than_the_limit_allows(name):
    payload = BOMBS[name].replace(BILLION, varint(1_000_000))
    # 50 bytes a parameter is what the widest legitimate decoding takes.
    assert peak_bytes(payload, Limits(max_parameters=1_000_000)) < 50 * 1_000_000


@pytest.mark.skipif("zstd" not in supported_stages(), reason="no zstd here")
@pytest.mark.parametrize("claimed", [100, 8000])
def test_decompression_bombs_are_refused(claimed):
    bomb = wrap.compress(bytes(200_000_000))
    payload = b"\xe7\x01\x00\x10" + codec_varint(claimed) + bomb
    limits = Limits(max_parameters=1000, max_bytes=50_000)
    assert len(payload) < limits.payload_bytes
    assert peak_bytes(payload, limits) < 1_000_000


def codec_varint(value):
    return bytes([value & 0x7F | 0x80, value >> 7])


@given(st.sets(st.integers(0, 2**32 - 2), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_positions_up_to_32_bits_round_trip(chosen):
    positions = np.array(sorted(chosen))
    if positions[-1] > 2**20 and len(positions) * 2**10 < positions[-1]:
        assert len(encode_positions(positions)) < 5 * len(positions) + 20
    reader = Reader(encode_positions(positions))
    np.testing.assert_array_equal(decode_positions(reader, len(positions), 2**32 - 1), positions)
    reader.finish()


@given(hnp.arrays(np.uint8, st.integers(1, 2000), elements=st.integers(0, 127)))
@settings(max_examples=100, deadline=None)
def test_symbols_round_trip(symbols):
    reader = Reader(encode_symbols(symbols))
    np.testing.assert_array_equal(decode_symbols(reader, len(symbols), 127), symbols)
    reader.finish()


def test_code_lengths_by_hand():
    # The textbook example: a:45 b:13 c:12 d:16 e:9 f:5 (Cormen et al., section 16.3).
    assert code_lengths(np.array([45.0, 13, 12, 16, 9, 5])).tolist() == [1, 3, 3, 3, 4, 4]


def test_code_lengths_stop_at_15_bits():
    fibonacci = [1.0, 1.0]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = code_lengths(np.array(fibonacci))
    assert lengths.max() == 15
    assert math.fsum(2.0 ** -int(length) for length in lengths) == 1.0


def test_positions_and_symbols_come_close_to_their_entropy():
    # 1 % of a million at random: 8.08 bits a position is the bound.
    positions = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < 0.01)
    p = len(positions) / 1e6
    bound = 1e6 * (-p * math.log2(p) - (1 - p) * math.log2(1 - p))
    assert 8 * len(encode_positions(positions)) <= 1.02 * bound
    # Magnitudes of an exponential distribution, as the tail of a delta has.
    symbols = np.minimum(np.random.default_rng(1).exponential(20, 10_000), 127).astype(np.uint8)
    shares = np.bincount(symbols) / len(symbols)
    shares = shares[shares > 0]
    assert 8 * len(encode_symbols(symbols)) <= 1.02 * len(symbols) * -(shares * np.log2(shares)).sum()

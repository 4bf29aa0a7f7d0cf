"""Codecs on vectors whose right answer is known by hand or from plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.protocol import CodecError, CodecSpec, Limits, decode, encode
from edgetrain.protocol.codecs import received, residual, supported_stages, wrap


def roundtrip(delta, spec, **options):
    return decode(encode(delta, spec, **options), Limits(max_parameters=len(delta)))


def normal(size, seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_topk_sends_the_largest_exactly_and_nothing_else():
    delta = np.array([0.5, -3, 0, 2, -0.25, 3], np.float32)
    decoded = roundtrip(delta, "topk:3")
    assert decoded.indices.tolist() == [1, 3, 5]
    assert decoded.dense().tolist() == [0, -3, 0, 2, 0, 3]


def test_equal_magnitudes_are_taken_from_the_front_and_zeros_never():
    assert roundtrip(np.array([1, -1, 1, -1], np.float32), "topk:2").indices.tolist() == [0, 1]
    assert roundtrip(np.array([0, 7, 0], np.float32), "topk:2").indices.tolist() == [1]


def test_topk_per_tensor_takes_its_share_of_each():
    delta = np.array([9, 8, 7, 6, 1, 2, 3, 4], np.float32)
    decoded = roundtrip(delta, "topk:0.25:per=tensor", offsets=[0, 4])
    assert decoded.indices.tolist() == [0, 7]


def test_ternary_sends_the_mean_magnitude_of_the_selected():
    delta = np.array([4, 0.5, -2, 0.25], np.float32)
    assert roundtrip(delta, "topk:2|ternary").dense().tolist() == [3, 0, -3, 0]


def test_sign_has_a_mean_magnitude_per_block():
    delta = np.array([1, -3, 0.5, 0.5, -8], np.float32)
    assert roundtrip(delta, "sign:block=2").dense().tolist() == [2, -2, 0.5, 0.5, -8]


def test_int8_codes_by_hand():
    # Scale 127 / 127 = 1 is a bfloat16.
    delta = np.array([127, -63.6, 0.4, -0.6], np.float32)
    assert roundtrip(delta, "int8:block=all").dense().tolist() == [127, -64, 0, -1]


def test_blocks_per_tensor_keep_small_tensors_precise():
    delta = np.array([1000, -1000, 0.001, -0.001], np.float32)
    whole = roundtrip(delta, "int8:block=all").dense()
    apart = roundtrip(delta, "int8:block=tensor", offsets=[0, 2]).dense()
    assert whole[2] == 0
    assert apart[2] == pytest.approx(0.001, rel=0.01)


def test_stochastic_rounding_is_unbiased_and_seeded():
    delta = np.full(100_000, 0.3, np.float32)
    delta[0] = 127
    spec = "int8:block=all:stochastic"
    decoded = roundtrip(delta, spec, seed=1).dense()[1:]
    assert set(np.unique(decoded)) == {0.0, 1.0}
    # Standard error 0.0015.
    assert decoded.mean() == pytest.approx(0.3, abs=0.006)
    assert encode(delta, spec, seed=1) == encode(delta, spec, seed=1) != encode(delta, spec, seed=2)


def test_random_k_needs_no_indices_on_the_wire():
    delta = normal(1000)
    small, large = (
        len(encode(delta, spec)) for spec in ("randk:10|int8:block=all|packed", "randk:100|int8:block=all|packed")
    )
    assert large - small == 90
    decoded = roundtrip(delta, "randk:100", seed=7)
    np.testing.assert_array_equal(decoded.values, delta[decoded.indices])
    assert (decoded.indices // 10).tolist() == list(range(100))


@pytest.mark.parametrize("spec", ["topk:0.01|int8:block=256|rice", "randk:0.1|int4", "dense|sign", "topk:0.02|ternary"])
def test_residual_is_what_the_receiver_did_not_see(spec):
    target = normal(10_000)
    payload = encode(target, spec, seed=3)
    seen = decode(payload, Limits(max_parameters=10_000)).dense()
    np.testing.assert_array_equal(residual(target, payload), target - seen)
    np.testing.assert_array_equal(received(target, payload).dense(), seen)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_delta_that_is_not_finite_is_refused(bad):
    delta = np.zeros(5, np.float32)
    delta[3] = bad
    with pytest.raises(CodecError, match="position 3"):
        encode(delta, "topk:1|int8")


@pytest.mark.parametrize("delta", [[0.5, 1.0], np.zeros(3), np.zeros((2, 2), np.float32)])
def test_a_delta_of_another_type_or_shape_is_refused(delta):
    with pytest.raises(CodecError, match="float32"):
        encode(delta, "dense")


def test_stages_that_work_by_tensor_need_the_offsets():
    for offsets in (None, [1], [0, 5], [0, 3, 2]):
        with pytest.raises(CodecError, match="offsets"):
            encode(np.ones(4, np.float32), "topk:1:per=tensor", offsets=offsets)


def test_float16_refuses_what_it_cannot_hold():
    with pytest.raises(CodecError, match="beyond float16"):
        encode(np.array([70000], np.float32), "float16")


def test_add_to_refuses_another_length():
    decoded = roundtrip(np.ones(4, np.float32), "topk:2")
    total = np.zeros(4)
    decoded.add_to(total, 0.5)
    assert total.tolist() == [0.5, 0.5, 0, 0]
    with pytest.raises(CodecError, match="4 parameters"):
        decoded.add_to(np.zeros(5))


def test_without_zstd_the_stage_is_not_offered_and_its_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(wrap, "_zstd", None)
    assert "zstd" not in supported_stages()
    assert CodecSpec.parse("topk:0.01|int8").stages <= supported_stages()
    for call in (
        lambda: encode(np.ones(4, np.float32), "dense|zstd"),
        lambda: decode(b"\xe7\x01\x00\x10\x05\x00", Limits(max_parameters=4)),
    ):
        with pytest.raises(CodecError, match="pip install"):
            call()


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("topk:0.01|int8:block=256|rice", "topk:0.01|int8:block=256|rice|huffman"),
        ("int8", "dense|int8:block=256|huffman"),
        ("topk:100:per=tensor|int4:block=tensor:stochastic|raw|packed|zstd",) * 2,
        ("topk:0.001|ternary", "topk:0.001|ternary:block=all|rice"),
        ("randk:1e-05|float16", "randk:1e-05|float16"),
    ],
)
def test_specs_have_a_canonical_name(text, canonical):
    assert str(CodecSpec.parse(text)) == canonical
    assert CodecSpec.parse(canonical) == CodecSpec.parse(text)


NO_CODECS = """
gzip | topk | topk:0 | topk:1.5 | topk:-1 | topk:nan | dense:3 | int8:block=0 | int8:block=x | rice:3
float16:stochastic | sign:stochastic | ternary | threshold:-1 | threshold:inf | randk:0.1:per=tensor
topk:0.1:0.2
"""


@pytest.mark.parametrize("text", ["", "|", "int8|topk:0.1", "int8|int4", *NO_CODECS.replace("|", " ").split()])
def test_no_such_codec(text):
    with pytest.raises(CodecError):
        CodecSpec.parse(text)

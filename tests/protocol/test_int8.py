"""Parameters in one byte: rounding, the file of initial parameters, and manifests that lie about it."""

from __future__ import annotations

from fractions import Fraction

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import BundleError
from edgetrain.protocol.int8 import (
    decode_parameters,
    encode_parameters,
    file_size,
    graph_inputs,
    nearest,
    representable,
)
from edgetrain.protocol.manifest import ParameterEntry, decode_manifest, encode_manifest

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(max_examples=200)
@given(WEIGHTS)
def test_rounding_is_exact_arithmetic_to_half_a_scale_and_done_once(weight):
    whole, scale = nearest(weight)
    assert np.abs(whole.astype(int)).max() <= 127
    back = whole * scale
    for q, s, w, b in zip(*(a.ravel() for a in np.broadcast_arrays(whole, scale, weight, back)), strict=True):
        exact = Fraction(int(q)) * Fraction(float(s))
        assert Fraction(float(b)) == exact
        assert abs(exact - Fraction(float(w))) <= Fraction(float(s)) * Fraction(501, 1000)
    again, same = nearest(back)
    assert np.array_equal(again * same, back)


def entries():
    shapes = {"a": ((4, 3, 2), "int8"), "b": ((4,), "float32"), "c": ((2, 9), "int8"), "d": ((3, 3), "float32")}
    found, offset = [], 0
    for name, (shape, dtype) in shapes.items():
        found.append(ParameterEntry(name=name, shape=shape, offset=offset, dtype=dtype))
        offset += found[-1].numel
    return tuple(found), np.random.default_rng(0).normal(size=offset).astype(np.float32)


def test_the_file_holds_a_byte_for_each_weight_and_gives_back_what_int8_can_hold():
    table, vector = entries()
    data = encode_parameters(vector, table)
    # 24 + 18 whole numbers, 4 + 2 scales, 4 + 9 floats.
    assert len(data) == file_size(table) == 42 + 24 + 52
    np.testing.assert_array_equal(decode_parameters(data, table), representable(vector, table))
    np.testing.assert_array_equal(representable(vector, table)[24:28], vector[24:28])
    assert data[:24] == graph_inputs(vector, table)[0].tobytes()


def test_without_int8_it_is_the_flat_vector():
    table, vector = entries()
    plain = tuple(msgspec.structs.replace(entry, dtype="float32") for entry in table)
    assert encode_parameters(vector, plain) == vector.tobytes()
    np.testing.assert_array_equal(decode_parameters(vector.tobytes(), plain), vector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: {"dtype": "int8", "shape": (entry.numel,)}, "is in int8 and has no rows"),
        (lambda entry: {"dtype": "int8"}, "parameters but initial parameters of"),
        (lambda entry: {"dtype": "int4"}, "breaks the schema"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tiny_bundle, change, message):
    manifest = Bundle(tiny_bundle).manifest
    first, *rest = manifest.parameters
    changed = msgspec.structs.replace(first, **change(first))
    with pytest.raises(BundleError, match=message):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, parameters=(changed, *rest))))

"""Reading bits: integers of any width, against Python's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.protocol import CodecError
from edgetrain.protocol.codecs.bits import Reader


@given(st.integers(0, 30), st.lists(st.integers(0, 2**30 - 1), min_size=1, max_size=40), st.binary(max_size=3))
def test_integers_are_read_as_they_were_written(width, numbers, rest):
    numbers = [number % (1 << width) for number in numbers]
    bits = len(numbers) * width
    stream = sum(number << (width * place) for place, number in enumerate(numbers))
    reader = Reader(stream.to_bytes((bits + 7) // 8, "little") + rest)
    assert reader.integers(len(numbers), width, "numbers").tolist() == numbers
    assert reader.remaining == len(rest)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_ones_are_found(bits):
    data = sum(bit << place for place, bit in enumerate(bits)).to_bytes((len(bits) + 7) // 8, "little")
    assert Reader(data).ones(len(bits), "bits").tolist() == [place for place, bit in enumerate(bits) if bit]


@pytest.mark.parametrize("width", [3, 8, 11])
def test_integers_that_are_cut_off_or_padded_with_ones_are_refused(width):
    data = bytes((5 * width + 7) // 8)
    with pytest.raises(CodecError, match="truncated payload: numbers"):
        Reader(data[:-1]).integers(5, width, "numbers")
    if 5 * width % 8:
        with pytest.raises(CodecError, match="numbers: padding bits that are not 0"):
            Reader(data[:-1] + b"\x80").integers(5, width, "numbers")

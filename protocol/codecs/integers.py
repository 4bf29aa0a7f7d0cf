"""How int8 and int4 codes are written: packed, or with Huffman-coded magnitudes, whichever is smaller.

Signs are as good as random, so they stand apart as one bit per code that is not 0; that halves the table.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from edgetrain.protocol.codecs.bits import Reader, pack_bits, pack_varint
from edgetrain.protocol.codecs.huffman import decode_symbols, encode_symbols
from edgetrain.protocol.codecs.quantize import Codes
from edgetrain.protocol.codecs.result import Bytes
from edgetrain.protocol.codecs.rice import decode_positions, encode_positions
from edgetrain.protocol.errors import CodecError


class ValueCoding(IntEnum):
    """On the wire."""

    PACKED = 0
    HUFFMAN = 1
    # Positions of the codes that are not 0, then those alone: Huffman spends at least one bit on a 0.
    SPARSE = 2


def encode_codes(codes: Codes, largest: int, *, huffman: bool) -> tuple[ValueCoding, bytes]:
    """Codes in [-largest, largest], largest 7 or 127, in their smallest form."""
    packed = _pack(codes, largest)
    if not huffman or not len(codes):
        return ValueCoding.PACKED, packed
    magnitudes = np.abs(codes).view(np.uint8)
    nonzero = codes[codes != 0]
    signs = pack_bits(nonzero < 0)
    forms = [(ValueCoding.PACKED, packed), (ValueCoding.HUFFMAN, encode_symbols(magnitudes) + signs)]
    if 2 * len(nonzero) < len(codes):
        forms.append((ValueCoding.SPARSE, _encode_sparse(codes, nonzero) + signs))
    return min(forms, key=lambda form: len(form[1]))


def decode_codes(reader: Reader, coding: ValueCoding, count: int, largest: int) -> Codes:
    """The inverse, int8 [count]."""
    if not count or coding is ValueCoding.PACKED:
        return _unpack(reader, count, largest)
    if coding is ValueCoding.HUFFMAN:
        magnitudes = decode_symbols(reader, count, largest)
        return _with_signs(reader, magnitudes, int(np.count_nonzero(magnitudes)))
    num_nonzero = reader.varint(count, "number of codes that are not 0")
    positions = decode_positions(reader, num_nonzero, count)
    codes = np.zeros(count, np.int8)
    if num_nonzero:
        codes[positions] = _with_signs(reader, decode_symbols(reader, num_nonzero, largest), num_nonzero)
    return codes


def _encode_sparse(codes: Codes, nonzero: Codes) -> bytes:
    out = pack_varint(len(nonzero)) + encode_positions(np.flatnonzero(codes))
    return out + encode_symbols(np.abs(nonzero).view(np.uint8)) if len(nonzero) else out


def _with_signs(reader: Reader, magnitudes: Bytes, num_nonzero: int) -> Codes:
    negative = reader.bits(num_nonzero, "signs")
    if num_nonzero < len(magnitudes):
        known, negative = negative, np.zeros(len(magnitudes), np.uint8)
        negative[(magnitudes != 0).nonzero()[0]] = known
    # In two's complement, -x is (x ^ -1) + 1.
    ones = negative.view(np.int8)
    codes = magnitudes.view(np.int8) ^ -ones
    codes += ones
    return codes


def _pack(codes: Codes, largest: int) -> bytes:
    if largest == 127:
        return codes.tobytes()
    nibbles = codes.view(np.uint8) & np.uint8(0xF)
    low, high = nibbles[0::2], nibbles[1::2]
    out = low.copy()
    out[: len(high)] |= high << np.uint8(4)
    return out.tobytes()


def _unpack(reader: Reader, count: int, largest: int) -> Codes:
    if largest == 127:
        codes = reader.array(count, "<i1", "int8 codes")
    else:
        raw = reader.take((count + 1) // 2, "int4 codes")
        nibbles = np.empty(2 * len(raw), np.uint8)
        nibbles[0::2] = raw << np.uint8(4)
        nibbles[1::2] = raw & np.uint8(0xF0)
        if count % 2 and nibbles[-1]:
            raise CodecError("int4 codes: padding that is not 0")
        codes = nibbles[:count].view(np.int8) >> 4
    if count and np.minimum.reduce(codes) < -largest:
        raise CodecError(f"code {codes.min()}, at least {-largest} is allowed")
    return codes

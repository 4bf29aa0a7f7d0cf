"""A decoder written from docs/codecs.md alone: bit by bit, standard library only, nothing of edgetrain.

The vectorized decoder must agree with it. It is also what a port to another language looks like. It trusts
its input (no limits), so that every line is about the layout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass
class Stream:
    data: bytes
    position: int = 0  # in bits

    def align(self):
        self.position = (self.position + 7) // 8 * 8

    def bit(self):
        byte = self.data[self.position // 8]
        self.position += 1
        return byte >> ((self.position - 1) % 8) & 1

    def bits(self, width):
        return sum(self.bit() << i for i in range(width))

    def unary(self):
        zeros = 0
        while not self.bit():
            zeros += 1
        return zeros

    def varint(self):
        value = shift = 0
        while True:
            byte = self.bits(8)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def scalars(self, count, letter):
        size = struct.calcsize(letter)
        start = self.position // 8
        self.position += 8 * count * size
        return list(struct.unpack(f"<{count}{letter}", self.data[start : start + count * size]))


def decode(payload, decompress=None):
    """The decoded vector as a list of Python floats."""
    magic, version, first, second = payload[:4]
    assert (magic, version) == (0xE7, 1)
    body = payload[4:]
    if second >> 4 == 1:
        sizes = Stream(body)
        size = sizes.varint()
        body = decompress(body[sizes.position // 8 :], size)
    stream = Stream(body)
    n = stream.varint()
    indices = read_indices(stream, first & 0xF, n)
    values = read_values(stream, first >> 4, second & 0xF, len(indices))
    assert stream.position == 8 * len(body)
    vector = [0.0] * n
    for index, value in zip(indices, values, strict=True):
        vector[index] = value
    return vector


def read_indices(stream, coding, n):
    if coding == 0:
        return list(range(n))
    m = stream.varint()
    if coding == 1:
        return read_positions(stream, m)
    if coding == 2:
        return stream.scalars(m, "I")
    return random_k(n, m, stream.scalars(1, "Q")[0])


def read_positions(stream, count):
    if count == 0:
        return []
    k = stream.bits(8)
    stream.varint()
    quotients = [stream.unary() for _ in range(count)]
    stream.align()
    remainders = [stream.bits(k) for _ in range(count)]
    stream.align()
    positions, last = [], -1
    for quotient, remainder in zip(quotients, remainders, strict=True):
        last += (quotient << k) + remainder + 1
        positions.append(last)
    return positions


def fmix32(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def counter_hash(seed, stream, i):
    low, high = seed & 0xFFFFFFFF, seed >> 32
    a = fmix32((low + fmix32((high + fmix32(stream)) & 0xFFFFFFFF)) & 0xFFFFFFFF)
    b = fmix32((a + 0x9E3779B9) & 0xFFFFFFFF)
    return fmix32(fmix32((i + a) & 0xFFFFFFFF) ^ b)


def random_k(n, m, seed):
    out = []
    for j in range(m):
        start, stop = j * n // m, (j + 1) * n // m
        out.append(start + (counter_hash(seed, 1, j) * (stop - start) >> 32))
    return out


def read_values(stream, quantizer, coding, m):
    if quantizer == 0:
        return stream.scalars(m, "f")
    if quantizer == 1:
        return stream.scalars(m, "e")
    block_of = read_blocks(stream, m)
    num_blocks = block_of[-1] + 1 if m else 0
    scales = [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in stream.scalars(num_blocks, "H")]
    if quantizer == 4:
        codes = [-1 if stream.bit() else 1 for _ in range(m)]
        stream.align()
    else:
        codes = read_codes(stream, quantizer, coding, m)
    return [code * scales[block] for code, block in zip(codes, block_of, strict=True)]


def read_blocks(stream, m):
    """The block of each value."""
    if m == 0:
        return []
    size = stream.varint()
    if size:
        return [i // size for i in range(m)]
    starts = [0, *read_positions(stream, stream.varint() - 1)]
    return [sum(start <= i for start in starts) - 1 for i in range(m)]


def read_codes(stream, quantizer, coding, m):
    if m == 0 or coding == 0:
        if quantizer == 2:
            return stream.scalars(m, "b")
        codes = [(stream.bits(4) ^ 8) - 8 for _ in range(m)]
        stream.align()
        return codes
    if coding == 1:
        positions, magnitudes = range(m), read_symbols(stream, m)
    else:
        z = stream.varint()
        positions = read_positions(stream, z)
        magnitudes = read_symbols(stream, z) if z else []
    codes = [0] * m
    for position, magnitude in zip(positions, magnitudes, strict=True):
        codes[position] = -magnitude if magnitude and stream.bit() else magnitude
    stream.align()
    return codes


def read_symbols(stream, count):
    lowest, span = stream.bits(8), stream.bits(8)
    if span == 0:
        return [lowest] * count
    lengths, last = [], 7
    for _ in range(span + 1):
        z = stream.unary()
        last += -(z + 1) // 2 if z % 2 else z // 2
        lengths.append(last)
    stream.align()
    symbol_of, code, previous = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths)):
        code <<= length - previous
        symbol_of[length, code] = lowest + symbol
        code, previous = code + 1, length
    symbols = [None] * count
    partial = [0] * count
    pending, level = list(range(count)), 0
    while pending:
        level += 1
        waiting = []
        for i in pending:
            partial[i] = partial[i] << 1 | stream.bit()
            if (level, partial[i]) in symbol_of:
                symbols[i] = symbol_of[level, partial[i]]
            else:
                waiting.append(i)
        pending = waiting
    stream.align()
    return symbols

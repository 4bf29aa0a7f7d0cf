"""Canonical Huffman codes in level order.

The stream holds the first bit of every symbol's code, then the second bit of those that have one, and so
on. That is the same number of bits as code after code, and a decoder works on whole arrays: at most 15
passes, each over the symbols that are not complete yet.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.bits import Reader, gaps_between, pack_bits, pack_unary
from edgetrain.protocol.codecs.result import Bytes, Indices
from edgetrain.protocol.errors import CodecError

MAX_LENGTH = 15
_FIRST_LENGTH = 7
_BYTE_BITS = 8
# A zigzag difference of lengths is at most 2 * 15, as unary at most 31 bits.
_TABLE_BITS_PER_SYMBOL = 31
# Counts summed over so many neighbours give lengths that are cheaper to send; it pays for short updates.
_WINDOWS = (1, 3, 9, 17)
# Symbols that are encoded at a time.
_PIECE = 1 << 16


def encode_symbols(symbols: Bytes) -> bytes:
    """Symbols (uint8 [m], m >= 1) as a table of code lengths and the codes."""
    lowest, highest = int(symbols.min()), int(symbols.max())
    counts = np.bincount(symbols, minlength=highest + 1)[lowest:]
    head = bytes([lowest, highest - lowest])
    if lowest == highest:
        return head
    candidates = [code_lengths(_smoothed(counts, window)) for window in _WINDOWS]
    lengths = min(candidates, key=lambda lengths: 8 * len(_pack_table(lengths)) + int(counts @ lengths))
    return head + _pack_table(lengths) + _pack_codes(symbols - np.uint8(lowest), lengths)


def decode_symbols(reader: Reader, count: int, largest: int) -> Bytes:
    """The inverse: `count` >= 1 symbols of at most `largest`, uint8 [count].

    Raises:
        CodecError: truncated, or not a complete prefix code.
    """
    lowest = reader.byte("lowest symbol")
    span = reader.byte("symbol span")
    if lowest + span > largest:
        raise CodecError(f"symbols up to {lowest + span}, at most {largest} is allowed here")
    if span == 0:
        return np.full(count, lowest, np.uint8)
    lengths = _read_table(reader, span + 1)
    order = np.argsort(lengths, kind="stable").astype(np.uint8) + np.uint8(lowest)
    per_length = np.bincount(lengths, minlength=MAX_LENGTH + 1).tolist()
    return _read_codes(reader, count, order, per_length)


def code_lengths(counts: npt.NDArray[np.float64]) -> Bytes:
    """Optimal lengths of at most 15 bits for at least two symbols, each at least 1.

    Package-merge (Larmore and Hirschberg 1990). A symbol that does not occur gets a code too: the
    table then stays smooth, and costs less than it saves.
    """
    order = np.argsort(counts, kind="stable")
    weights = np.maximum(counts[order], 0.5)
    merged, is_leaf = [weights], [np.ones(len(weights), bool)]
    for _ in range(MAX_LENGTH - 1):
        last = merged[-1][: len(merged[-1]) // 2 * 2]
        items = np.concatenate([weights, last[0::2] + last[1::2]])
        ranks = np.argsort(items, kind="stable")
        merged.append(items[ranks])
        is_leaf.append(ranks < len(weights))
    lengths = np.zeros(len(weights), np.uint8)
    taken = 2 * len(weights) - 2
    for leaves in reversed(is_leaf):
        num_leaves = int(leaves[:taken].sum())
        lengths[order[:num_leaves]] += 1
        taken = 2 * (taken - num_leaves)
    return lengths


def _smoothed(counts: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.float64]:
    padded = np.pad(counts.astype(np.float64), window // 2, mode="edge")
    return np.convolve(padded, np.ones(window), "valid")


def _canonical(lengths: Bytes) -> npt.NDArray[np.uint16]:
    """Codes in order of (length, symbol), each left-aligned in 15 bits."""
    order = np.argsort(lengths, kind="stable")
    widths = np.int64(1) << (MAX_LENGTH - lengths[order].astype(np.int64))
    codes = np.empty(len(lengths), np.uint16)
    codes[order] = np.cumsum(widths) - widths
    return codes


def _pack_table(lengths: Bytes) -> bytes:
    steps = np.diff(lengths.astype(np.int64), prepend=_FIRST_LENGTH)
    return pack_unary(np.where(steps < 0, -2 * steps - 1, 2 * steps))


def _read_table(reader: Reader, size: int) -> Bytes:
    raw = reader.peek(size * _TABLE_BITS_PER_SYMBOL // 8 + 1)
    ends = np.unpackbits(raw, bitorder="little").view(np.bool_).nonzero()[0][:size]
    if len(ends) < size:
        raise CodecError(f"truncated payload: a table of {size} code lengths")
    reader.bits(int(ends[-1]) + 1, "code lengths")
    zigzag = gaps_between(ends)
    # 0, 1, 2, 3, 4 stand for 0, -1, 1, -2, 2.
    lengths = _FIRST_LENGTH + ((zigzag >> 1) ^ -(zigzag & 1)).cumsum()
    if lengths.min() < 1 or lengths.max() > MAX_LENGTH:
        raise CodecError(f"code lengths from {lengths.min()} to {lengths.max()}, not within 1 to {MAX_LENGTH}")
    if int((1 << (MAX_LENGTH - lengths)).sum()) != 1 << MAX_LENGTH:
        raise CodecError("the code lengths are not those of a complete prefix code")
    return lengths.astype(np.uint8)


def _pack_codes(symbols: Bytes, lengths: Bytes) -> bytes:
    canonical = _canonical(lengths)
    # Canonical: of the codes that end before a level, all are lower than the first that does not.
    firsts = [int(canonical[lengths >= level].min()) for level in range(1, int(lengths.max()) + 1)]
    levels: list[list[npt.NDArray[np.bool_]]] = [[] for _ in firsts]
    # In pieces that stay in the processor's cache.
    for start in range(0, len(symbols), _PIECE):
        codes = np.take(canonical, symbols[start : start + _PIECE])
        for level, first in enumerate(firsts):
            if first:
                codes = codes.take(np.flatnonzero(codes >= first))
            levels[level].append((codes & (1 << (MAX_LENGTH - 1 - level))) != 0)
    return pack_bits(np.concatenate([bits for level in levels for bits in level]))


def _read_codes(reader: Reader, count: int, order: Bytes, per_length: list[int]) -> Bytes:
    # Of the symbols that are not complete, their bits so far.
    codes = np.zeros(count, np.uint8)
    # Of every length that there is: the symbols, as if none was longer, and which of them are.
    found: list[tuple[Bytes, Indices]] = []
    # Of the codes of this length, in canonical order: the first, and its rank among all.
    first = rank = 0
    levels = reader.bit_levels()
    for length, complete in enumerate(per_length[1:], 1):
        first *= 2
        if length == _BYTE_BITS + 1:
            codes = codes.astype(np.uint16)
        # Twice as fast as a shift.
        codes += codes
        codes |= levels.take(len(codes), "Huffman codes")
        if not complete:
            continue
        # For codes that go on, a wrong symbol, which is replaced below.
        symbols = order.take(codes + codes.dtype.type((rank - first) % (1 << 8 * codes.itemsize)), mode="clip")
        first += complete
        rank += complete
        # Canonical: the complete codes of a length are its lowest.
        longer = (codes >= first).nonzero()[0]
        found.append((symbols, longer))
        if not len(longer):
            break
        codes = codes.take(longer)
    levels.finish()
    symbols, _ = found.pop()
    while found:
        last, (symbols, longer) = symbols, found.pop()
        symbols[longer] = last
    return symbols

"""Bits and bytes. Everything is little-endian; bit i of a stream is bit i % 8 of byte i // 8."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.protocol.codecs.result import Bytes
from edgetrain.protocol.errors import CodecError

_VARINT_BYTES = 5
_HEADER_BYTES = 4
# Integers that are read together.
_GROUP = 8
_DTYPES = {name: np.dtype(name) for name in ("<i1", "<u2", "<u4", "<f2", "<f4")}
# Bytes whose bits are unpacked at once.
_AHEAD_BYTES = 1 << 14


class Reader:
    """A cursor over hostile bytes: whatever is taken was checked to be there."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._bytes: Bytes = np.frombuffer(data, np.uint8)
        # The same: single bytes are read from here, which is much faster.
        self._view = memoryview(data).cast("B")
        self._size = len(self._view)
        self._position = 0

    @property
    def remaining(self) -> int:
        """Bytes not yet read."""
        return self._size - self._position

    def take(self, count: int, what: str) -> Bytes:
        """The next `count` bytes, a view."""
        start, stop = self._position, self._position + count
        if stop > self._size:
            raise self._truncated(count, what)
        self._position = stop
        return self._bytes[start:stop]

    def header(self) -> bytes:
        """The first four bytes."""
        self.take(_HEADER_BYTES, "header")
        return self._view[:_HEADER_BYTES].tobytes()

    def _truncated(self, count: int, what: str) -> CodecError:
        return CodecError(
            f"truncated payload: {what} needs {count} bytes at byte {self._position}, {self.remaining} are left"
        )

    def array(self, count: int, dtype: str, what: str) -> npt.NDArray[Any]:
        """The next `count` elements of a little-endian dtype such as "<u2"."""
        kind = _DTYPES[dtype]
        return self.take(count * kind.itemsize, what).view(kind)

    def byte(self, what: str) -> int:
        """The next byte."""
        position = self._position
        if position >= self._size:
            raise self._truncated(1, what)
        self._position = position + 1
        return self._view[position]

    def varint(self, maximum: int, what: str) -> int:
        """The next LEB128 integer, at most `maximum`."""
        value = 0
        for i in range(_VARINT_BYTES):
            byte = self.byte(what)
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                break
        else:
            raise CodecError(f"{what}: an integer of more than {_VARINT_BYTES} bytes")
        if value > maximum:
            raise CodecError(f"{what} is {value}, at most {maximum} is allowed here")
        return value

    def bits(self, count: int, what: str) -> Bytes:
        """The next `count` bits as 0 and 1, uint8 [count]; the rest of the last byte must be 0."""
        return np.unpackbits(self._packed(count, what), count=count, bitorder="little")

    def ones(self, count: int, what: str) -> npt.NDArray[np.int64]:
        """Ascending positions of the ones among the next `count` bits."""
        # Of booleans it is five times as fast.
        return self.bits(count, what).view(np.bool_).nonzero()[0]

    def _packed(self, count: int, what: str) -> Bytes:
        """The bytes of the next `count` bits."""
        raw = self.take((count + 7) // 8, what)
        if count % 8 and raw[-1] >> (count % 8):
            raise CodecError(f"{what}: padding bits that are not 0")
        return raw

    def integers(self, count: int, width: int, what: str) -> npt.NDArray[np.int64]:
        """The next `count` integers of `width` bits each, lowest bit first, int64 [count]."""
        if not 1 <= width <= _GROUP:
            columns = self.bits(count * width, what).reshape(count, width)
            values: npt.NDArray[np.int64] = columns @ (1 << np.arange(width))
            return values
        raw = self._packed(count * width, what)
        # Eight integers fill `width` bytes, which fit into a word.
        words = np.zeros((-(-count // _GROUP), _GROUP), np.uint8)
        full = len(raw) // width
        words[:full, :width] = raw[: full * width].reshape(full, width)
        if full < len(words):
            words[full, : len(raw) - full * width] = raw[full * width :]
        values = words.view("<i8") >> np.arange(0, _GROUP * width, width)
        values &= (1 << width) - 1
        return values.reshape(-1)[:count]

    def peek(self, count: int) -> Bytes:
        """Up to `count` of the next bytes, without reading them."""
        return self._bytes[self._position : self._position + count]

    def give_back(self, count: int) -> None:
        """The last `count` bytes that were taken will be taken again."""
        self._position -= count

    def bit_levels(self) -> BitLevels:
        """A cursor over bits whose number is not known beforehand; ends with `BitLevels.finish`."""
        return BitLevels(self)

    def finish(self) -> None:
        """Refuses what follows the end."""
        if self.remaining:
            raise CodecError(f"{self.remaining} bytes follow the end of the payload")


class BitLevels:
    """Runs of bits one after the other, without padding between them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        # Bits that are unpacked, and how many of them are taken.
        self._bits: Bytes = np.zeros(0, np.uint8)
        self._taken = 0

    def take(self, count: int, what: str) -> Bytes:
        """The next `count` bits as 0 and 1."""
        missing = self._taken + count - len(self._bits)
        if missing > 0:
            # Some more at once: there are many short runs.
            size = max((missing + 7) // 8, min(_AHEAD_BYTES, self._reader.remaining))
            fresh = np.unpackbits(self._reader.take(size, what), bitorder="little")
            left = self._bits[self._taken :]
            self._bits, self._taken = np.concatenate([left, fresh]) if len(left) else fresh, 0
        self._taken += count
        return self._bits[self._taken - count : self._taken]

    def finish(self) -> None:
        """Gives back what was not asked for; refuses padding that is not 0."""
        left = self._bits[self._taken :]
        self._reader.give_back(len(left) // 8)
        if left[: len(left) % 8].any():
            raise CodecError("padding bits that are not 0")


def pack_varint(value: int) -> bytes:
    """LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def pack_bits(bits: npt.NDArray[np.uint8] | npt.NDArray[np.bool_]) -> bytes:
    """0s and 1s to bytes."""
    return np.packbits(bits, bitorder="little").tobytes()


def pack_integers(values: npt.NDArray[np.int64], width: int) -> bytes:
    """Each integer in `width` bits, lowest bit first."""
    columns = np.empty((len(values), width), np.uint8)
    for i in range(width):
        columns[:, i] = (values >> i) & 1
    return pack_bits(columns.reshape(-1))


def pack_unary(values: npt.NDArray[np.int64]) -> bytes:
    """Each integer v >= 0 as v zeros and a one."""
    ends = np.cumsum(values + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    bits[ends] = 1
    return pack_bits(bits)


def gaps_between(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many lie between each of ascending positions and the one before, int64 [len(positions)]; new."""
    gaps = positions.copy()
    gaps[1:] -= positions[:-1]
    gaps[1:] -= 1
    return gaps

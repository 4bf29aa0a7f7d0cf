"""The payload: four bytes that name the stages, and the body. `docs/codecs.md` gives every bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np

from edgetrain.protocol.codecs import wrap
from edgetrain.protocol.codecs.bits import Reader, pack_bits, pack_varint
from edgetrain.protocol.codecs.blocks import BlockCodes
from edgetrain.protocol.codecs.integers import ValueCoding, decode_codes, encode_codes
from edgetrain.protocol.codecs.quantize import (
    LARGEST,
    check_scales,
    from_integers,
    from_signs,
    to_integers,
    to_signs,
)
from edgetrain.protocol.codecs.result import MAX_PARAMETERS, Indices, Limits, SparseOrDense
from edgetrain.protocol.codecs.rice import decode_positions, encode_positions
from edgetrain.protocol.codecs.selection import magnitude_bits, random_k, select
from edgetrain.protocol.codecs.spec import CodecSpec
from edgetrain.protocol.errors import CodecError
from edgetrain.protocol.vectors import Vector

MAGIC = 0xE7
VERSION = 1
_INFINITY = 0x7F800000
# How values are coded, and their bytes in pieces.
_Packed = tuple[ValueCoding, tuple[bytes | memoryview, ...]]


class IndexCoding(IntEnum):
    """Low nibble of byte 2."""

    DENSE = 0
    RICE = 1
    RAW = 2
    SEED = 3


class Quantizer(IntEnum):
    """High nibble of byte 2."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT8 = 2
    INT4 = 3
    SIGN = 4


class Wrap(IntEnum):
    """High nibble of byte 3; `ValueCoding` is the low one."""

    NONE = 0
    ZSTD = 1


def encode(delta: Vector, spec: str | CodecSpec, *, seed: int = 0, offsets: Sequence[int] | None = None) -> bytes:
    """Encodes a vector. The same arguments give the same bytes.

    Args:
        delta: float32 [n], finite.
        spec: which codec, e.g. "topk:0.01|int8:block=256".
        seed: for randk (both sides know it) and stochastic rounding (use another for every update), below
            2^64.
        offsets: where each tensor starts, ascending from 0: the `offset`s of the manifest's parameters. Only
            for specs with "per=tensor" or "block=tensor".

    Raises:
        CodecError: no such codec, or a delta that it cannot carry.
    """
    return begin_encoding(delta, spec, seed=seed, offsets=offsets).payload()


@dataclass(frozen=True, slots=True)
class Encoding:
    """A vector whose values are selected and quantized, so that what its receivers will see is settled."""

    num_parameters: int
    _indices: Indices | None
    _restored: Callable[[], Vector]
    _payload: Callable[[], bytes]

    def payload(self) -> bytes:
        """What `encode` returns."""
        return self._payload()

    def restored(self) -> SparseOrDense:
        """What `decode` makes of the payload, which need not be there for it."""
        return SparseOrDense(self.num_parameters, self._indices, self._restored())


def begin_encoding(
    delta: Vector, spec: str | CodecSpec, *, seed: int = 0, offsets: Sequence[int] | None = None
) -> Encoding:
    """The first half of `encode`; arguments and errors as there. The vector must not change before the second."""
    spec = CodecSpec.parse(spec) if isinstance(spec, str) else spec
    delta = np.asarray(delta)
    if delta.dtype != np.float32 or delta.ndim != 1:
        raise CodecError(f"a delta is float32 [n], not {delta.dtype} {list(delta.shape)}")
    if len(delta) > MAX_PARAMETERS:
        raise CodecError(f"a delta of {len(delta)} parameters, at most {MAX_PARAMETERS} can be encoded")
    delta = np.ascontiguousarray(delta)
    if not _is_finite(delta):
        position = int((magnitude_bits(delta) >= _INFINITY).argmax())
        raise CodecError(f"the delta is not finite at position {position}: training diverged")
    tensors = _boundaries(spec, len(delta), offsets)
    indices = select(spec, delta, tensors, seed)
    values = delta if indices is None else delta[indices]
    quantizer, restored, packed = _quantize(spec, values, indices, tensors, seed)

    def payload() -> bytes:
        index_coding, head = _encode_indices(spec, indices, len(delta), seed)
        coding, tail = packed()
        body: tuple[bytes | memoryview, ...] = (head, *tail)
        method = Wrap.NONE
        if spec.zstd:
            plain = b"".join(body)
            smaller = pack_varint(len(plain)) + wrap.compress(plain)
            if len(smaller) < len(plain):
                method, body = Wrap.ZSTD, (smaller,)
        first = bytes([MAGIC, VERSION, index_coding | quantizer << 4, coding | method << 4])
        return b"".join((first, *body))

    return Encoding(len(delta), indices, restored, payload)


def decode(data: bytes | bytearray | memoryview, limits: Limits) -> SparseOrDense:
    """Decodes a payload, which may be hostile.

    Raises:
        CodecError: not a payload, of another version, inconsistent, or beyond the limits. Nothing else.
    """
    data = memoryview(data)
    if data.nbytes > limits.payload_bytes:
        raise CodecError(f"a payload of {data.nbytes} bytes, at most {limits.payload_bytes} are allowed")
    reader = Reader(data)
    magic, version, first, second = reader.header()
    if magic != MAGIC:
        raise CodecError(f"not an encoded update: it starts with 0x{magic:02x}, not 0x{MAGIC:02x}")
    if version != VERSION:
        raise CodecError(f"an update of codec version {version}, this edgetrain reads {VERSION}: upgrade")
    index_coding, quantizer, coding, wrapped = _stages(first, second)
    if wrapped is Wrap.ZSTD:
        size = reader.varint(limits.payload_bytes, "decompressed size")
        reader = Reader(wrap.decompress(reader.take(reader.remaining, "zstd frame").tobytes(), size))
    num_parameters = reader.varint(min(limits.max_parameters, MAX_PARAMETERS), "number of parameters")
    count, indices = _decode_indices(reader, index_coding, num_parameters)
    values = _decode_values(reader, quantizer, coding, count, dense=indices is None)
    reader.finish()
    return SparseOrDense(num_parameters, indices, values)


def _boundaries(spec: CodecSpec, size: int, offsets: Sequence[int] | None) -> Indices:
    if not spec.per_tensor and spec.block != "tensor":
        return np.array([0, size], np.int64)
    if offsets is None:
        raise CodecError(f"codec {str(spec)!r} works tensor by tensor: pass the offsets of the parameter table")
    bounds = np.array([*offsets, size], np.int64)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise CodecError(f"tensor offsets must ascend from 0 to {size}, not {list(offsets)[:8]}")
    return bounds


def _encode_indices(spec: CodecSpec, indices: Indices | None, size: int, seed: int) -> tuple[IndexCoding, bytes]:
    head = pack_varint(size)
    if indices is None:
        return IndexCoding.DENSE, head
    head += pack_varint(len(indices))
    if spec.select == "randk":
        return IndexCoding.SEED, head + seed.to_bytes(8, "little")
    if spec.index == "raw":
        return IndexCoding.RAW, head + indices.astype("<u4").tobytes()
    return IndexCoding.RICE, head + encode_positions(indices)


def _decode_indices(reader: Reader, coding: IndexCoding, size: int) -> tuple[int, Indices | None]:
    if coding is IndexCoding.DENSE:
        return size, None
    count = reader.varint(size, "number of values")
    if coding is IndexCoding.SEED:
        seed = int.from_bytes(reader.take(8, "seed").tobytes(), "little")
        return count, random_k(size, count, seed)
    if coding is IndexCoding.RICE:
        return count, decode_positions(reader, count, size)
    indices = reader.array(count, "<u4", "indices").astype(np.int64)
    if count and (indices[-1] >= size or (np.diff(indices) <= 0).any()):
        raise CodecError(f"indices that do not ascend strictly below {size}")
    return count, indices


def _quantize(
    spec: CodecSpec, values: Vector, indices: Indices | None, tensors: Indices, seed: int
) -> tuple[Quantizer, Callable[[], Vector], Callable[[], _Packed]]:
    """How they are coded, what makes of them what a receiver decodes, and what makes their bytes."""
    if spec.quantize == "float32":
        return Quantizer.FLOAT32, values.copy, lambda: (ValueCoding.PACKED, (values.astype("<f4", copy=False).data,))
    if spec.quantize == "float16":
        with np.errstate(over="ignore", under="ignore"):
            halves = values.astype("<f2")
        if not np.isfinite(halves).all():
            raise CodecError(f"a value of {np.abs(values).max():.3g} is beyond float16: use int8 or float32")
        return Quantizer.FLOAT16, lambda: halves.astype(np.float32), lambda: (ValueCoding.PACKED, (halves.data,))
    starts, blocks = _encode_blocks(spec, len(values), indices, tensors)
    if spec.quantize in LARGEST:
        largest = LARGEST[spec.quantize]
        scales, codes = to_integers(
            values, starts, largest, stochastic=spec.stochastic, seed=seed, quantizer=spec.quantize
        )

        def packed() -> _Packed:
            coding, coded = encode_codes(codes, largest, huffman=spec.values == "huffman")
            return coding, (blocks, scales.astype("<u2").tobytes(), coded)

        return Quantizer[spec.quantize.upper()], lambda: from_integers(codes, scales, starts), packed
    scales, negative = to_signs(values, starts)
    return (
        Quantizer.SIGN,
        lambda: from_signs(negative, scales, starts),
        lambda: (ValueCoding.PACKED, (blocks, scales.astype("<u2").tobytes(), pack_bits(negative))),
    )


def _decode_values(
    reader: Reader, quantizer: Quantizer, coding: ValueCoding, count: int, *, dense: bool
) -> Vector | BlockCodes:
    if quantizer not in (Quantizer.INT8, Quantizer.INT4) and coding is not ValueCoding.PACKED:
        raise CodecError(f"{quantizer.name} values are not {coding.name} coded")
    if quantizer in (Quantizer.FLOAT32, Quantizer.FLOAT16):
        dtype = "<f4" if quantizer is Quantizer.FLOAT32 else "<f2"
        values: Vector = reader.array(count, dtype, "values").astype(np.float32)
        if not _is_finite(values):
            raise CodecError("values that are not finite")
        return values
    size = reader.varint(count, "block size") if count else 0
    starts = _decode_starts(reader, count) if count and not size else None
    num_blocks = -(-count // size) if size else 0 if starts is None else len(starts)
    scales = reader.array(num_blocks, "<u2", "scales")
    if quantizer is Quantizer.SIGN:
        check_scales(scales, 1)
        return from_signs(reader.bits(count, "signs"), scales, _starts(starts, count, size))
    largest = LARGEST["int8" if quantizer is Quantizer.INT8 else "int4"]
    top = check_scales(scales, largest)
    codes = decode_codes(reader, coding, count, largest)
    if dense and size:
        return BlockCodes(codes, scales, size, largest, top)
    return from_integers(codes, scales, _starts(starts, count, size))


def _starts(starts: Indices | None, count: int, size: int) -> Indices:
    """Of the blocks; None stands for blocks of one size."""
    return np.arange(0, count, size or 1) if starts is None else starts


def _encode_blocks(spec: CodecSpec, count: int, indices: Indices | None, tensors: Indices) -> tuple[Indices, bytes]:
    """Starts of the blocks of the sent values, and how they are written."""
    if not count:
        return np.zeros(0, np.int64), b""
    if spec.block == "tensor":
        starts = tensors[:-1] if indices is None else np.searchsorted(indices, tensors[:-1])
        starts = np.unique(starts[starts < count])
        if len(starts) > 1:
            return starts, b"\0" + pack_varint(len(starts)) + encode_positions(starts[1:])
    size = min(spec.block, count) if isinstance(spec.block, int) else count
    return np.arange(0, count, size), pack_varint(size)


def _decode_starts(reader: Reader, count: int) -> Indices:
    num_blocks = reader.varint(count, "number of blocks")
    rest = decode_positions(reader, max(num_blocks - 1, 0), count)
    if num_blocks == 0 or (len(rest) and rest[0] == 0):
        raise CodecError(f"{num_blocks} blocks, or an empty one, for {count} values")
    return np.concatenate([np.zeros(1, np.int64), rest])


def _is_finite(values: Vector) -> bool:
    # A NaN is the largest and the smallest of all.
    return not len(values) or bool(np.isfinite(values.max()) and np.isfinite(values.min()))


@functools.cache
def _stages(first: int, second: int) -> tuple[IndexCoding, Quantizer, ValueCoding, Wrap]:
    """What bytes 2 and 3 name; few combinations come again and again."""
    return (
        _member(IndexCoding, first & 0xF, "index coding"),
        _member(Quantizer, first >> 4, "quantizer"),
        _member(ValueCoding, second & 0xF, "value coding"),
        _member(Wrap, second >> 4, "wrap"),
    )


_Enum = TypeVar("_Enum", bound=IntEnum)


def _member(kind: type[_Enum], value: int, what: str) -> _Enum:
    try:
        return kind(value)
    except ValueError as error:
        raise CodecError(f"no {what} has number {value}: the sender is newer, or the bytes are corrupt") from error

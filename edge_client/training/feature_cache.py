"""Features on disk: what the frozen trunk makes of the local data, computed once instead of in every epoch.

A cache is one file, written whole or not at all:

    magic             8 bytes
    key              32 bytes, SHA-256 over the bundle's digest, the program, the precision and the trunk's inputs
    checksum         32 bytes, SHA-256 of what follows the header
    error             8 bytes, float64: what rounding changed, relative
    at byte 128, each at a multiple of 64, for every feature in the manifest's order:
        scales       float32 [N], unless the values are as the trunk gave them
        values       [N, ...] in the stored dtype

One with another key or a wrong checksum is built again. Each sample's feature has a scale of its own: for int8 its
largest value / 127; for float16, which keeps 11 significant bits, the power of two above it, so that small ones do not
vanish nor large ones overflow. Features of whole numbers stay as they are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError, StateError
from edgetrain.edge_client.host.memory import map_rows
from edgetrain.edge_client.runtimes.base import Session
from edgetrain.edge_client.runtimes.leaves import Array, flatten, leaf_key
from edgetrain.edge_client.runtimes.parts import TRUNK
from edgetrain.edge_client.training.dataset import Dataset, map_half, pieces
from edgetrain.protocol.files import sync_directory
from edgetrain.protocol.graph_names import FEATURE
from edgetrain.protocol.manifest import TensorSpec

logger = logging.getLogger(__name__)

Precision = Literal["float32", "float16", "int8"]

MAGIC = b"EDGEFTR1"
_HEADER = struct.Struct("8s32s32s")
_START, _ALIGN = 128, 64
_CHUNK = 1 << 20
# Left free on the disk: updates and residuals must still be written.
RESERVE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class FeatureDataset(Dataset):
    """Samples whose inputs are features, memory-mapped."""

    # Of features that are kept as float16 or int8, [N]: `inputs[name] * scales[name]` is the feature.
    scales: dict[str, npt.NDArray[np.float32]] | None = None

    def subset(self, indices: npt.NDArray[np.int64]) -> Dataset:
        """The samples at `indices`, in full precision."""
        # Not super(): a dataclass with slots is another class than the one that the call would look for.
        part = Dataset.subset(self, indices)
        rows = self.rows(indices)
        if not self.scales:
            return part
        assert isinstance(part.inputs, dict)
        inputs = dict(part.inputs)
        for name, scales in self.scales.items():
            factors = scales[rows].reshape(-1, *[1] * (inputs[name].ndim - 1))
            inputs[name] = inputs[name].astype(np.float32) * factors
        return Dataset(inputs, part.targets, part.weights)


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """What a cache gives."""

    dataset: Dataset
    # Root mean square of what rounding changed, relative to that of the features.
    error: float
    # Of the file.
    size: int
    # Whether an earlier file was used.
    reused: bool


class _Stored(msgspec.Struct, frozen=True):
    """One feature in the file."""

    spec: TensorSpec
    dtype: str
    shape: tuple[int, ...]
    offset: int
    # Where its scales are; None without.
    scales: int | None


def cache_features(
    session: Session,
    dataset: Dataset,
    path: Path,
    *,
    bundle: bytes,
    precision: Precision,
    max_bytes: int,
) -> CachedFeatures:
    """The data set with features for inputs, from the file or computed now.

    Args:
        session: of a split program, whole.
        dataset: checked against the bundle.
        path: the cache's file.
        bundle: digest of the bundle.
        precision: how float features are kept.
        max_bytes: most bytes of the file.

    Raises:
        StateError: the disk is full, or the file too large or not writable.
        DataError: a feature is NaN or infinite.
        SessionError: the trunk does not run.
    """
    program = session.manifest.program(session.runtime)
    trunk = program.graphs[TRUNK]
    stored, size = _layout(trunk.outputs, len(dataset), precision)
    if size > max_bytes:
        raise StateError(
            f"{path}: the features of {len(dataset)} samples need {size:,} bytes, {max_bytes:,} are allowed"
        )
    key = _key(session, dataset, bundle, precision)
    error = _read_valid(path, key, size)
    reused = error is not None
    if error is None:
        error = _build(session, dataset, path, stored, size, key)
    return CachedFeatures(_open(session, dataset, path, stored), error, size, reused)


def _layout(features: tuple[TensorSpec, ...], count: int, precision: Precision) -> tuple[list[_Stored], int]:
    stored = []
    end = _START
    for spec in features:
        is_float = np.dtype(spec.dtype).kind == "f"
        dtype = precision if is_float else spec.dtype
        scales = None
        if is_float and precision != "float32":
            scales, end = end, _aligned(end + 4 * count)
        shape = (count, *spec.shape[1:])
        stored.append(_Stored(spec, dtype, shape, end, scales))
        end = _aligned(end + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return stored, end


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _key(session: Session, dataset: Dataset, bundle: bytes, precision: str) -> bytes:
    """Names everything that the features depend on."""
    trunk = session.manifest.program(session.runtime).graphs[TRUNK]
    digest = hashlib.sha256()
    for part in (MAGIC, bundle, session.runtime.encode(), bytes.fromhex(trunk.file.sha256), precision.encode()):
        digest.update(struct.pack("<I", len(part)) + part)
    structure = session.manifest.batch.inputs
    read = {spec.name for spec in trunk.inputs}
    for leaf, array in zip(structure.leaves, flatten("inputs", structure, dataset.inputs), strict=True):
        if leaf.name in read:
            digest.update(f"{leaf.name} {array.dtype.str} {array.shape}".encode())
            for _, rows in pieces(array):
                digest.update(np.ascontiguousarray(rows).data)
    if dataset.chosen is not None:
        digest.update(b"chosen")
        digest.update(np.ascontiguousarray(dataset.chosen, "<i8").data)
    return digest.digest()


def _read_valid(path: Path, key: bytes, size: int) -> float | None:
    """The error that a file states, if it is whole and has this key."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return None
            magic, found, checksum = _HEADER.unpack(file.read(_HEADER.size))
            (error,) = struct.unpack("<d", file.read(8))
            if magic != MAGIC or found != key or checksum != _checksum(file):
                return None
            return float(error)
    except (OSError, struct.error):
        return None


def _checksum(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    file.seek(_HEADER.size)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.digest()


def _build(session: Session, dataset: Dataset, path: Path, stored: list[_Stored], size: int, key: bytes) -> float:
    """Writes the file; returns the error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.unlink(missing_ok=True)
        status = os.statvfs(path.parent)
        if size + RESERVE_BYTES > status.f_bavail * status.f_frsize:
            raise StateError(f"{path}: {size:,} bytes of features do not fit on the disk")
        with temporary.open("w+b") as file:
            file.truncate(size)
            error = _fill(session, dataset, file, stored)
            file.seek(_HEADER.size)
            file.write(struct.pack("<d", error))
            checksum = _checksum(file)
            file.seek(0)
            file.write(_HEADER.pack(MAGIC, key, checksum))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as problem:
        raise StateError(f"{path}: cannot keep features: {problem}") from problem
    finally:
        temporary.unlink(missing_ok=True)
    return error


def _fill(session: Session, dataset: Dataset, file: BinaryIO, stored: list[_Stored]) -> float:
    error = energy = 0.0
    for first, features in _features(session, dataset):
        for entry in stored:
            values = features[entry.spec.name]
            kept, scales = _keep(entry, values)
            if values.dtype.kind == "f":
                exact = values.astype(np.float64)
                restored = kept.astype(np.float64) * (1 if scales is None else scales.astype(np.float64))
                error += float(np.square(restored - exact).sum())
                energy += float(np.square(exact).sum())
            if entry.scales is not None and scales is not None:
                file.seek(entry.scales + 4 * first)
                file.write(scales.ravel().tobytes())
            row = int(np.prod(entry.shape[1:])) * np.dtype(entry.dtype).itemsize
            file.seek(entry.offset + first * row)
            file.write(kept.tobytes())
    return float(np.sqrt(error / energy)) if energy else 0.0


def _features(session: Session, dataset: Dataset) -> Iterator[tuple[int, dict[str, Array]]]:
    size = session.manifest.micro_batch
    for first in range(0, len(dataset), size):
        (inputs, _), _ = dataset.take(np.arange(first, min(first + size, len(dataset))))
        yield first, session.features(inputs)


def _keep(entry: _Stored, values: Array) -> tuple[Array, npt.NDArray[np.float32] | None]:
    """Values as they are stored, and their scales, [count, 1, …], where they have any."""
    if not np.isfinite(values).all():
        raise DataError(f"{entry.spec.name}: the trunk gives a value that is NaN or infinite")
    if entry.scales is None:
        return values.astype(entry.dtype), None
    floats = values.astype(np.float32)
    largest = np.abs(floats).max(axis=tuple(range(1, floats.ndim)), keepdims=True, initial=0)
    if entry.dtype == "float16":
        power = np.clip(np.frexp(largest)[1], -100, 127)
        scales = np.where(largest > 0, np.ldexp(np.float32(1), power), np.float32(1)).astype(np.float32)
        return (floats / scales).astype(np.float16), scales
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(floats / scales).astype(np.int8), scales


def _open(session: Session, dataset: Dataset, path: Path, stored: list[_Stored]) -> Dataset:
    read = {spec.name for spec in session.manifest.program(session.runtime).graphs["head_step"].inputs}
    structure = session.manifest.batch.inputs
    inputs: dict[str, Array] = {}
    scales: dict[str, npt.NDArray[np.float32]] = {}

    def picked(array: Array) -> Array:
        return array if dataset.chosen is None else array[dataset.chosen]

    for entry in stored:
        inputs[entry.spec.name] = map_rows(path, entry.dtype, entry.offset, entry.shape)
        if entry.scales is not None:
            scales[entry.spec.name] = np.fromfile(path, np.float32, entry.shape[0], offset=entry.scales)
    for leaf, array in zip(structure.leaves, flatten("inputs", structure, dataset.inputs), strict=True):
        if leaf.name in read:
            inputs[leaf_key("inputs", leaf)] = picked(array)
    inputs = {name: array for name, array in inputs.items() if name in read or not name.startswith(FEATURE)}
    weights = None if dataset.weights is None else picked(dataset.weights)
    return FeatureDataset(inputs, map_half(picked, dataset.targets), weights, scales=scales or None)

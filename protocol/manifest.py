"""The manifest: what a bundle holds and how to run it.

A bundle is a directory, or the same as one uncompressed zip (`.edge`). `manifest.json` describes it:

- `parameters` lays the trainable tensors out in one flat float32 vector;
- `batch` says how the user's `(inputs, targets)` is structured, and the dtype and shape of every leaf;
- `programs` holds one lowering per runtime; a device needs the files of its own runtime only;
- every file is named with its SHA-256 and size, so whoever trusts the manifest can trust the bundle;
- `self_test` is an example batch with the loss and gradients that eager torch gives for it.

Versions: a reader refuses another major version and ignores fields that it does not know.

Graph names: `step`, `eval`, `infer`, and, when parts are frozen or privacy is asked for, `trunk`, `head_step`,
`head_eval`, `step_per_sample_clipped`, `training_module`.

Graph inputs, in order (`TensorSpec.name` is the name inside the graph; see `edgetrain.protocol.graph_names`):

- `step`: the parameters in manifest order, for each of those in int8 its scales [O], the batch leaves that the
  graph needs, `weights` -> `loss_sum`, `weight_sum`, the metrics in manifest order, one gradient per parameter in
  manifest order.
- `eval`: the same inputs -> `loss_sum`, `weight_sum`, the metrics.
- `infer`: the parameters and scales, the input leaves -> the module's outputs.
- `trunk`: input leaves -> `features.0`, `features.1`, …, which depend on no parameter; dimension 0 is the micro-batch.
- `head_step`: the parameters and scales, the features, further batch leaves, `weights` -> the outputs of `step`.
- `head_eval`: the inputs of `head_step` -> the outputs of `eval`. A program whose frozen part is quantized has these
  three instead of `step` and `eval`: the features are then what the quantized trunk gives.
- `training_module` (executorch only): the batch leaves that the graph needs, `weights` -> `loss_sum`, `weight_sum`, the
  metrics; for ExecuTorch's TrainingModule, which holds the parameters, by name, and their gradients.
- `step_per_sample_clipped`: the inputs of `step`, `clip_norm` (a scalar) -> the outputs of `step`, where each
  sample's gradient was clipped to that norm before the sum, then `norms` [B], the norms before clipping.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from edgetrain.protocol.errors import BundleError
from edgetrain.protocol.int8 import file_size

FORMAT = "edgetrain-bundle"
FORMAT_MAJOR = 1
FORMAT_MINOR = 0
MANIFEST_FILE = "manifest.json"
# The graph for differential privacy, and its further input.
STEP_CLIPPED = "step_per_sample_clipped"
CLIP_NORM = "clip_norm"
# No backslashes, which are separators elsewhere, and no control characters.
_FILE_NAME = re.compile(r"[^\\\x00-\x1f\x7f]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_Element = TypeVar("_Element", bound=np.generic)
Dtype = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Name, dtype and static shape of one tensor."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * np.dtype(self.dtype).itemsize


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the bundle, by its path relative to the manifest."""

    file: str
    sha256: str
    size: int


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """One lowered program. Inputs and outputs are in call order; see the module docstring."""

    file: FileEntry
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    # Further files that the program loads by relative path (external data), if any.
    extra_files: tuple[FileEntry, ...] = ()
    # Bytes of activations that the runtime plans for one call, where the lowering knows it.
    planned_memory: int | None = None


class StorageReport(msgspec.Struct, frozen=True, kw_only=True):
    """What storing the frozen part in fewer bytes brings and costs."""

    # "float16", "int8", "int8-static" or "int8-dynamic"; see `edgetrain.export.storage`.
    kind: str
    # Of all graphs of the program, with float32 weights and as they are.
    bytes_before: int
    bytes_after: int
    # Of the trunk alone; 0 if there is none.
    trunk_bytes_before: int = 0
    trunk_bytes_after: int = 0
    # Mean loss with the initial parameters on so many samples.
    calibration_samples: int
    loss_before: float
    loss_after: float
    # Root mean square of what integer arithmetic changes in the trunk's features, relative to them, on the same
    # samples; None if the trunk computes in float32.
    feature_error: float | None = None


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """All graphs of one runtime."""

    runtime: str
    # The oldest version of the runtime that can run it, as "1.22".
    minimum_version: str
    graphs: dict[str, Graph]
    # How the frozen part is stored; None for float32.
    storage: StorageReport | None = None


class ParameterEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One trainable tensor: `vector[offset : offset + numel]` reshaped to `shape`, row-major."""

    # The user's own module path, e.g. "features.3.conv.weight".
    name: str
    shape: tuple[int, ...]
    offset: int
    # "int8": kept as whole multiples of a scale for each row between steps and in the bundle, see `protocol.int8`.
    # In the flat vector it is float32 like the others.
    dtype: Literal["float32", "int8"] = "float32"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def of(self, vector: npt.NDArray[_Element]) -> npt.NDArray[_Element]:
        """This tensor in a flat vector [num_parameters], as a view of shape `shape`: what is written to it is there."""
        return vector[self.offset : self.offset + self.numel].reshape(self.shape)


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """How one half of a batch is put together: a bare array, a tuple of arrays, or a dict of arrays.

    Leaves are in the tuple's order or in the dict's insertion order. A leaf's name is the half's name
    ("inputs"), followed by "." and its index or key unless the half is a bare array. Dimension 0 of every
    leaf is the micro-batch.
    """

    kind: Literal["array", "tuple", "dict"]
    leaves: tuple[TensorSpec, ...]


class BatchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The batch `(inputs, targets)` and its weights."""

    inputs: Structure
    targets: Structure
    # float32, [B], or [B, T] where the loss is per token.
    weights: TensorSpec


class FrozenSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What does not learn, and how it is stored."""

    # Number of frozen elements and of the bytes they take in the largest program.
    elements: int = 0
    bytes: int = 0
    # Names of the frozen parameters and buffers that were quantized, with the dtype.
    quantized: dict[str, str] = {}
    # For sparse updates: parameter name -> channels that learn.
    sparse: dict[str, tuple[int, ...]] = {}


class TrainableStorage(msgspec.Struct, frozen=True, kw_only=True):
    """What keeping trainable weights in int8 brings and costs, at the initial parameters."""

    kind: Literal["int8"]
    # Of the initial parameters: with float32 weights, and as they are.
    bytes_before: int
    bytes_after: int
    # Mean loss on so many samples, with float32 weights and as they are.
    calibration_samples: int
    loss_before: float
    loss_after: float


class GradientCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Two numbers that a right gradient must reproduce.

    `projection` is the dot product with the sign pattern of `probe_signs`, which unlike the norm also sees
    a gradient of the right size in the wrong direction.
    """

    name: str
    norm: float
    projection: float


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """An example batch and what eager torch computes for it with the initial parameters.

    `file` holds the leaves of inputs, then targets, then the weights, as raw little-endian arrays one after
    the other without padding, in the order and with the dtypes and shapes of `Manifest.batch`.
    """

    file: FileEntry
    loss_sum: float
    weight_sum: float
    # Weighted sums; of a metric with several values, the sum of them.
    metrics: dict[str, float]
    gradients: tuple[GradientCheck, ...]
    # Relative error that passes: int8 kernels of other processors may round an activation to the neighbour.
    tolerance: float = 1e-3


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a reader needs to know about a bundle."""

    format: str = FORMAT
    format_version: tuple[int, int] = (FORMAT_MAJOR, FORMAT_MINOR)
    name: str
    # "edgetrain 0.1.0", for people.
    producer: str
    # Samples per call of `step`; larger batches are accumulated, smaller ones padded with weight 0.
    micro_batch: int
    parameters: tuple[ParameterEntry, ...]
    # Raw little-endian float32, the flat vector to start from; with parameters in int8 as `protocol.int8` says.
    initial_parameters: FileEntry
    batch: BatchSpec
    # For people: the qualified name of the loss.
    loss: str
    # Metrics in graph order. Each output is a weighted sum, to be divided by the weight sum.
    metrics: tuple[str, ...] = ()
    # The selection as the user wrote it ("all", "last:4", …).
    trainable: str = "all"
    frozen: FrozenSummary = FrozenSummary()
    # How trainable weights are kept; None for float32.
    trainable_storage: TrainableStorage | None = None
    # For people: what the export changed in the model, and what it noticed.
    notes: tuple[str, ...] = ()
    programs: tuple[Program, ...]
    self_test: SelfTest

    @property
    def num_parameters(self) -> int:
        """Length of the flat vector."""
        return sum(entry.numel for entry in self.parameters)

    def program(self, runtime: str) -> Program:
        """The program for `runtime`.

        Raises:
            BundleError: the bundle was not exported for that runtime.
        """
        for program in self.programs:
            if program.runtime == runtime:
                return program
        have = ", ".join(program.runtime for program in self.programs)
        raise BundleError(
            f"bundle {self.name!r} has no program for runtime {runtime!r}, only for: {have}. "
            f"Export it again with --runtime {runtime}."
        )

    def files(self, runtime: str | None = None) -> list[FileEntry]:
        """Files that a device needs: those of one runtime, or of all. In a stable order, each once."""
        programs = self.programs if runtime is None else (self.program(runtime),)
        return list({entry.file: entry for entry in self.entries(programs)}.values())

    def entries(self, programs: Iterable[Program]) -> Iterator[FileEntry]:
        """Every mention of a file; the same one may be named more than once."""
        yield self.initial_parameters
        yield self.self_test.file
        for program in programs:
            for graph in program.graphs.values():
                yield graph.file
                yield from graph.extra_files


def probe_signs(numel: int) -> np.ndarray:
    """The fixed ±1 pattern of `GradientCheck.projection`, float32 [numel].

    Element i is +1 if the top bit of (i * 2654435761) mod 2^32 is clear, else -1: Knuth's multiplicative
    hash, so that every language writes it in one line.
    """
    hashed = np.arange(numel, dtype=np.uint64) * np.uint64(2654435761)
    return np.where(hashed & np.uint64(0x80000000), np.float32(-1), np.float32(1))


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON: the bytes whose SHA-256 is the bundle's digest."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Reads and validates a manifest.

    Raises:
        BundleError: not a manifest, another major version, or contents that contradict each other.
    """
    version = peek_version(data)
    if version[0] != FORMAT_MAJOR:
        remedy = "upgrade edgetrain on this machine" if version[0] > FORMAT_MAJOR else "export the bundle again"
        raise BundleError(
            f"the bundle has format version {version[0]}.{version[1]}, this edgetrain reads {FORMAT_MAJOR}.x: {remedy}"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"manifest.json breaks the schema: {error}") from error
    _validate(manifest)
    return manifest


class _Peek(msgspec.Struct):
    format: str
    format_version: tuple[int, int]


def peek_version(data: bytes) -> tuple[int, int]:
    """The format version of a manifest of any version.

    Raises:
        BundleError: not the manifest of a bundle.
    """
    try:
        peek = msgspec.json.decode(data, type=_Peek)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"manifest.json is not an edgetrain manifest: {error}") from error
    if peek.format != FORMAT:
        raise BundleError(f"manifest.json is of format {peek.format!r}, not {FORMAT!r}")
    return peek.format_version


def _validate(manifest: Manifest) -> None:
    offset = 0
    names: set[str] = set()
    for entry in manifest.parameters:
        if entry.name in names:
            raise BundleError(f"manifest.json: parameter {entry.name!r} is there twice")
        names.add(entry.name)
        if entry.offset != offset or any(dim < 0 for dim in entry.shape):
            raise BundleError(f"manifest.json: parameter {entry.name!r} does not start at offset {offset}")
        if entry.dtype == "int8" and len(entry.shape) < 2:
            raise BundleError(f"manifest.json: parameter {entry.name!r} is in int8 and has no rows")
        offset += entry.numel
    if manifest.micro_batch < 1:
        raise BundleError(f"manifest.json: micro_batch is {manifest.micro_batch}, must be at least 1")
    if manifest.initial_parameters.size != file_size(manifest.parameters):
        raise BundleError(
            f"manifest.json: {offset} parameters but initial parameters of {manifest.initial_parameters.size} bytes"
        )
    if [check.name for check in manifest.self_test.gradients] != [entry.name for entry in manifest.parameters]:
        raise BundleError("manifest.json: the self-test does not name the parameters in order")
    halves = (manifest.batch.inputs, manifest.batch.targets)
    specs = [*(leaf for half in halves for leaf in half.leaves), manifest.batch.weights]
    for spec in specs:
        if not spec.shape or spec.shape[0] != manifest.micro_batch or any(dim < 0 for dim in spec.shape):
            raise BundleError(
                f"manifest.json: {spec.name!r} has shape {spec.shape}; dimension 0 must be the micro-batch "
                f"of {manifest.micro_batch}"
            )
    if manifest.self_test.file.size != sum(spec.nbytes for spec in specs):
        raise BundleError("manifest.json: the self-test's file is not one batch and its weights")
    files = {file.file: file for file in manifest.files()}
    for file in manifest.entries(manifest.programs):
        _check_file(file)
        if files[file.file] != file:
            raise BundleError(f"manifest.json: file {file.file!r} has two sizes or hashes")


def _check_file(file: FileEntry) -> None:
    path = PurePosixPath(file.file)
    if path.is_absolute() or ".." in path.parts or not path.parts or not _FILE_NAME.fullmatch(file.file):
        raise BundleError(f"manifest.json: file {file.file!r} points outside the bundle")
    if str(path) == MANIFEST_FILE:
        raise BundleError("manifest.json: names itself as a file of the bundle")
    if file.size < 0 or not _SHA256.fullmatch(file.sha256):
        raise BundleError(f"manifest.json: file {file.file!r} has an impossible size or hash")

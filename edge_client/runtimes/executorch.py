"""ExecuTorch without torch: the programs that phones run, by the C++ libraries of the `executorch` wheel.

Parameters are read where they lie in the flat vector and gradients are written where they belong; the batch is
read from the staging buffers. `executorch_build` says how the library between is made.
"""

from __future__ import annotations

import mmap
import re

import numpy as np

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes.base import Parameters
from edgetrain.edge_client.runtimes.executorch_build import (
    INSTALL,
    MINIMUM_VERSION,
    build,
    built_library,
    find_compiler,
    find_wheel,
)
from edgetrain.edge_client.runtimes.executorch_library import (
    MAX_PLANNED_BYTES,
    Program,
    ProgramError,
    set_threads,
)
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.parts import num_parameters
from edgetrain.edge_client.runtimes.session import BoundGraph, GraphSession
from edgetrain.edge_client.runtimes.staging import READ_BEYOND
from edgetrain.edge_client.runtimes.versions import check_minimum, parse_version
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Graph, Manifest, TensorSpec
from edgetrain.protocol.vectors import Vector

# What the kernels that read indices say when one is out of range.
_BAD_INDEX = re.compile(
    r"operator aten::(embedding|gather|index|index_put|index_select|nll_loss\w*|scatter\w*)\.", re.IGNORECASE
)


class ExecutorchRuntime:
    """ExecuTorch with XNNPACK on the CPU."""

    name = "executorch"

    def available(self) -> str | None:
        """None if the wheel is here and the library is built or can be, else the reason and the remedy."""
        try:
            wheel = find_wheel()
            if parse_version(wheel.version) < parse_version(MINIMUM_VERSION):
                return f"executorch {wheel.version} is too old, {MINIMUM_VERSION} is needed: {INSTALL}"
            if built_library(wheel) is None and find_compiler() is None:
                build(wheel)  # says what is missing
        except SessionError as error:
            return str(error)
        return None

    def open(self, bundle: Bundle, *, threads: int) -> ExecutorchSession:
        """Opens the bundle's program for executorch; nothing is loaded yet.

        `threads` is set for the whole process: all programs share one pool.

        Raises:
            SessionError: not installed, too old, or no compiler.
            BundleError: no program for this runtime.
        """
        check_minimum(bundle.manifest, self.name, find_wheel().version, "executorch")
        set_threads(threads)
        return ExecutorchSession(self.name, bundle, threads=threads)


class ExecutorchSession(GraphSession):
    """One bundle on ExecuTorch. See `base.Session`."""

    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph, once its file is verified."""
        del name
        file = graph.file.file
        data = self.bundle.map(graph.file)
        limit = MAX_PLANNED_BYTES if graph.planned_memory is None else graph.planned_memory
        try:
            program = Program(data, limit)
            _check_tensors(file, "input", program.inputs, graph.inputs)
            _check_tensors(file, "output", program.outputs, graph.outputs)
            bound = _ExecutorchGraph(program, graph, self.manifest, self.staging.arrays, outputs)
        except ProgramError as error:
            raise SessionError(f"{self.bundle.path}: {file}: {_remedy(str(error))}") from error
        if isinstance(data.obj, mmap.mmap) and hasattr(data.obj, "madvise"):
            # XNNPACK has packed the weights into memory of its own.
            data.obj.madvise(mmap.MADV_DONTNEED)
        return bound


class _ExecutorchGraph:
    """A loaded program with the staged batch and the outputs bound."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        manifest: Manifest,
        leaves: dict[str, Array],
        outputs: list[Array],
    ) -> None:
        self._program = program
        self._file = graph.file.file
        self._parameters: Vector | None = None
        count = num_parameters(manifest, graph)
        self._entries = manifest.parameters[:count]
        for index, spec in enumerate(graph.inputs[count:], count):
            program.bind(index, leaves[spec.name], output=False)
        for index, array in enumerate(outputs):
            program.bind(index, array, output=True)

    def run(self, parameters: Parameters) -> None:
        """One call; see `BoundGraph`."""
        assert isinstance(parameters, np.ndarray), "refused when opened"
        if self._entries and parameters is not self._parameters:
            safe = _readable_beyond(parameters)
            for index, entry in enumerate(self._entries):
                self._program.bind(index, entry.of(safe), output=False)
            self._parameters = parameters if safe is parameters else None
        try:
            self._program.run()
        except ProgramError as error:
            if _BAD_INDEX.search(str(error)):
                raise DataError(f"an index in the batch is out of range: {self._file}: {error}") from error
            raise SessionError(f"executorch failed in {self._file}: {error}") from error


def _readable_beyond(vector: Vector) -> Vector:
    """The vector, or a copy if it ends at the end of a page, behind which memory may not be readable."""
    end = vector.ctypes.data + vector.nbytes
    if -end % mmap.PAGESIZE >= READ_BEYOND:
        return vector
    return np.concatenate([vector, np.zeros(READ_BEYOND // 4, np.float32)])[: vector.size]


def _check_tensors(file: str, what: str, found: tuple[TensorSpec, ...], declared: tuple[TensorSpec, ...]) -> None:
    have = [(spec.dtype, spec.shape) for spec in found]
    if have != [(spec.dtype, spec.shape) for spec in declared]:
        raise SessionError(f"{file}: its {what}s are not the manifest's: {have}")


def _remedy(error: str) -> str:
    """What ExecuTorch says, each thing once, and what to do about it."""
    error = "; ".join(list(dict.fromkeys(part.strip() for part in error.split(";")))[:5]).removesuffix(".")
    if re.search(r"unsupported_hardware|XnnpackBackend is not available", error):
        return (
            "XNNPACK does not know this processor (it wants SSE2 on x86, NEON on ARM): use another runtime, "
            f"e.g. --runtime onnxruntime. {error}"
        )
    if re.search(r"[Mm]issing operator|OperatorMissing|backend .*not registered|NotFound", error):
        return (
            f"{error}: it needs a kernel or backend that this executorch does not have; export the bundle again with "
            f"the version that runs here, or {INSTALL}"
        )
    return f"{error}. If it was exported for another version of executorch, export it again, or {INSTALL}"

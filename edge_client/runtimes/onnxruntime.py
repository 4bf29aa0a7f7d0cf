"""The default runtime: training steps as plain ONNX inference in onnxruntime.

Parameters go in and gradients come out without a copy: the graph's inputs are bound to views of the flat
parameter vector, its gradient outputs to views of one preallocated flat vector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.host.memory import trim
from edgetrain.edge_client.runtimes.base import Parameters
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.parts import num_parameters
from edgetrain.edge_client.runtimes.session import BoundGraph, GraphSession, first_line
from edgetrain.edge_client.runtimes.versions import check_minimum, parse_version
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import FileEntry, Graph, Manifest

if TYPE_CHECKING:
    import onnxruntime

# 1.21 crashes on a Raspberry Pi 4.
MINIMUM_VERSION = "1.22"
# The sum before a layer norm inside of it: seven times slower than the two alone (onnxruntime 1.31, one thread).
SLOW_FUSIONS = ("SkipLayerNormFusion",)
INSTALL = f'pip install "onnxruntime>={MINIMUM_VERSION}"'


class OnnxRuntime:
    """Plain onnxruntime on the CPU."""

    name = "onnxruntime"

    def available(self) -> str | None:
        """None if onnxruntime is here and new enough, else the reason and the pip line."""
        try:
            import onnxruntime
        except ImportError:
            return f"runtime onnxruntime is not installed: {INSTALL}"
        version = onnxruntime.__version__
        if parse_version(version) < parse_version(MINIMUM_VERSION):
            return f"onnxruntime {version} is too old, at least {MINIMUM_VERSION} is needed: {INSTALL}"
        return None

    def open(self, bundle: Bundle, *, threads: int) -> OnnxSession:
        """Opens the bundle's program for onnxruntime; nothing is loaded yet.

        Raises:
            SessionError: too old, or it cannot bind parameters as the bundle keeps them.
            BundleError: no program for this runtime.
        """
        import onnxruntime

        check_minimum(bundle.manifest, self.name, onnxruntime.__version__, "onnxruntime")
        return OnnxSession(self.name, bundle, threads=threads)


class OnnxSession(GraphSession):
    """One bundle on onnxruntime. See `base.Session`."""

    takes_int8 = True

    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph and binds our memory to it."""
        del name
        # A weight that is widened wherever it is read must not be kept for all of its readers.
        switched_off = ("CommonSubexpressionElimination",) if self.in_int8 else ()
        session = load_model(
            self.bundle, graph.file, graph.extra_files, threads=self.threads, switched_off=switched_off
        )
        for what, have, declared in (
            ("inputs", session.get_inputs(), graph.inputs),
            ("outputs", session.get_outputs(), graph.outputs),
        ):
            found = [(value.name, tuple(value.shape)) for value in have]
            if found != [(spec.name, spec.shape) for spec in declared]:
                raise SessionError(
                    f"{self.bundle.path}: the {what} of {graph.file.file} are not the manifest's: {found}"
                )
        bound = OnnxGraph(session, graph, self.manifest, self.staging.arrays)
        for spec, array in zip(graph.outputs, outputs, strict=True):
            bound.bind_output(spec.name, array)
        return bound


class OnnxGraph:
    """A loaded graph with the parameters and the staged batch bound as its inputs."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        graph: Graph,
        manifest: Manifest,
        leaves: dict[str, Array],
    ) -> None:
        self.binding = session.io_binding()
        self._session = session
        self._file = graph.file.file
        self._outputs: list[Array] = []
        self._bound: Parameters | None = None
        self._entries = manifest.parameters
        count = num_parameters(manifest, graph)
        takes = {value.name for value in session.get_inputs()}
        # Position among the parameters and scales, and name.
        self._parameters = [(i, spec.name) for i, spec in enumerate(graph.inputs[:count]) if spec.name in takes]
        for spec in graph.inputs[count:]:
            self.binding.bind_cpu_input(spec.name, leaves[spec.name])

    def bind_output(self, name: str, array: Array) -> None:
        """Has the graph write one output to `array`."""
        self.binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # The binding keeps the address only.
        self._outputs.append(array)

    def run(self, parameters: Parameters) -> None:
        """One call; see `BoundGraph`."""
        if self._parameters and parameters is not self._bound:
            if isinstance(parameters, Int8Parameters):
                arrays = parameters.graph_inputs()
            else:
                arrays = [entry.of(parameters) for entry in self._entries]
            for position, name in self._parameters:
                self.binding.bind_cpu_input(name, arrays[position])
            self._bound = parameters
        try:
            self._session.run_with_iobinding(self.binding)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            message = f"{self._file}: {first_line(error)}"
            if re.search(r"out of (data )?bounds|out of range", str(error)):
                raise DataError(f"an index in the batch is out of range: {message}") from error
            raise SessionError(f"onnxruntime failed in {message}") from error


def load_model(
    bundle: Bundle,
    file: FileEntry,
    external: Sequence[FileEntry] = (),
    *,
    threads: int,
    switched_off: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Loads one verified model.

    Args:
        bundle: where the files are.
        file: the model.
        external: files of tensors that it refers to by name.
        threads: threads of one step; 0 lets onnxruntime choose.
        switched_off: onnxruntime's optimizers that are to leave it alone, besides the slow ones.

    Raises:
        SessionError: onnxruntime refuses the model.
        BundleError: a file is missing or corrupt.
    """
    import onnxruntime

    options = session_options(threads)
    if external:
        data = [bundle.read(entry) for entry in external]
        options.add_external_initializers_from_files_in_memory(
            [PurePosixPath(entry.file).name for entry in external], data, [len(part) for part in data]
        )
    model = bundle.read(file)
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*SLOW_FUSIONS, *switched_off]
        )
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise SessionError(
            f"{bundle.path}: onnxruntime {onnxruntime.__version__} cannot load {file.file}: {first_line(error)}"
        ) from error
    del model
    # What optimizing the graph took.
    trim()
    return session


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for small machines."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # One block for all activations at once: 24 of 135 MB more for a language model, and no faster.
    options.enable_mem_pattern = False
    # In the order of the graph, gradients of weights follow where their operands are still in the cache.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # What goes wrong is raised; nothing is printed besides.
    options.log_severity_level = 4
    return options

"""The default runtime: training steps as plain ONNX inference in onnxruntime.

Parameters go in and gradients come out without a copy: the graph's inputs are bound to views of the flat
parameter vector, its gradient outputs to views of one preallocated flat vector.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes.base import Vector
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.session import BoundGraph, GraphSession, first_line, view
from edgetrain.edge_client.runtimes.versions import check_minimum, parse_version
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Graph, Manifest

if TYPE_CHECKING:
    import onnxruntime

# 1.21 crashes on a Raspberry Pi 4.
MINIMUM_VERSION = "1.22"
INSTALL = f'pip install "onnxruntime>={MINIMUM_VERSION}"'


class OnnxRuntime:
    """Plain onnxruntime on the CPU."""

    name = "onnxruntime"

    def available(self) -> str | None:
        """None if onnxruntime is here and new enough, else the reason and the pip line."""
        try:
            import onnxruntime  # noqa: PLC0415 - only who runs a session pays for it
        except ImportError:
            return f"runtime onnxruntime is not installed: {INSTALL}"
        version = onnxruntime.__version__
        if parse_version(version) < parse_version(MINIMUM_VERSION):
            return f"onnxruntime {version} is too old, at least {MINIMUM_VERSION} is needed: {INSTALL}"
        return None

    def open(self, bundle: Bundle, *, threads: int) -> OnnxSession:
        """Loads the bundle's program for onnxruntime.

        Raises:
            SessionError: not installed, too old, or the program does not load.
            BundleError: no program for this runtime, or a corrupt file.
        """
        import onnxruntime  # noqa: PLC0415

        check_minimum(bundle.manifest, self.name, onnxruntime.__version__, "onnxruntime")
        return OnnxSession(self.name, bundle, threads=threads)


class OnnxSession(GraphSession):
    """One bundle on onnxruntime. See `base.Session`."""

    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph and binds our memory to it."""
        del name
        session = load_graph(self.bundle, graph, threads=self.threads)
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
            bound.binding.bind_output(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # `bind_output` keeps the address only.
        bound.outputs = outputs
        return bound


class OnnxGraph:
    """A loaded graph with the parameters and the staged batch bound as its inputs."""

    outputs: list[Array]

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
        self._bound: Vector | None = None
        count = len(manifest.parameters)
        names = [spec.name for spec in graph.inputs[:count]]
        self._parameters = list(zip(names, manifest.parameters, strict=True))
        for spec in graph.inputs[count:]:
            self.binding.bind_cpu_input(spec.name, leaves[spec.name])

    def run(self, parameters: Vector) -> None:
        """One call; see `BoundGraph`."""
        if parameters is not self._bound:
            for name, entry in self._parameters:
                self.binding.bind_cpu_input(name, view(parameters, entry))
            self._bound = parameters
        try:
            self._session.run_with_iobinding(self.binding)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            message = f"{self._file}: {first_line(error)}"
            if re.search(r"out of (data )?bounds|out of range", str(error)):
                raise DataError(f"an index in the batch is out of range: {message}") from error
            raise SessionError(f"onnxruntime failed in {message}") from error


def load_graph(bundle: Bundle, graph: Graph, *, threads: int) -> onnxruntime.InferenceSession:
    """Loads one verified graph.

    Raises:
        SessionError: onnxruntime refuses the model.
        BundleError: a file is missing or corrupt.
    """
    import onnxruntime  # noqa: PLC0415

    options = session_options(threads)
    external = [(Path(entry.file).name, bundle.read(entry)) for entry in graph.extra_files]
    if external:
        options.add_external_initializers_from_files_in_memory(
            [name for name, _ in external],
            [data for _, data in external],
            [len(data) for _, data in external],
        )
    data = bundle.read(graph.file)
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise SessionError(
            f"{bundle.path}: onnxruntime {onnxruntime.__version__} cannot load {graph.file.file}: "
            f"{first_line(error)}"
        ) from error


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for small machines."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # One block for all activations at once: 24 of 135 MB more for a language model, and no faster.
    options.enable_mem_pattern = False
    # What goes wrong is raised; nothing is printed besides.
    options.log_severity_level = 4
    return options

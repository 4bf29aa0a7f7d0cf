"""The default runtime: training steps as plain ONNX inference in onnxruntime.

Parameters go in and gradients come out without a copy: the graph's inputs are bound to views of the flat
parameter vector, its gradient outputs to views of one preallocated flat vector.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes.base import Batch, EvalResult, Half, StepResult, Vector
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.staging import Staging, check_vector
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Graph, Manifest, ParameterEntry

if TYPE_CHECKING:
    import onnxruntime

# 1.21 crashes on a Raspberry Pi 4.
MINIMUM_VERSION = (1, 22)
INSTALL = 'pip install "onnxruntime>=1.22"'


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
        if parse_version(version) < MINIMUM_VERSION:
            return f"onnxruntime {version} is too old, at least 1.22 is needed: {INSTALL}"
        return None

    def open(self, bundle: Bundle, *, threads: int) -> OnnxSession:
        """Loads the bundle's `step` graph; `eval` and `infer` load when first called.

        Raises:
            SessionError: not installed, too old, or the program does not load.
            BundleError: no program for this runtime, or a corrupt file.
        """
        import onnxruntime  # noqa: PLC0415

        program = bundle.manifest.program(self.name)
        if parse_version(onnxruntime.__version__) < parse_version(program.minimum_version):
            raise SessionError(
                f"bundle {bundle.manifest.name!r} needs onnxruntime {program.minimum_version}, here is "
                f'{onnxruntime.__version__}: pip install "onnxruntime>={program.minimum_version}"'
            )
        return OnnxSession(bundle, threads=threads)


class OnnxSession:
    """One bundle on onnxruntime. See `base.Session`."""

    runtime = OnnxRuntime.name

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self.manifest: Manifest = bundle.manifest
        self._bundle = bundle
        self._threads = threads
        self._graphs = bundle.manifest.program(self.runtime).graphs
        self._staging = Staging(self.manifest)
        self._gradients: Vector = np.zeros(self.manifest.num_parameters, np.float32)
        self._bound: dict[str, _BoundGraph] = {}
        self._graph("step")

    def step(
        self, parameters: Vector, batch: Batch, weights: npt.NDArray[np.float32] | None = None
    ) -> StepResult:
        """Loss and gradients of one micro-batch."""
        self._staging.fill(batch, weights)
        outputs = self._graph("step").run(parameters)
        return StepResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs), self._gradients)

    def evaluate(
        self, parameters: Vector, batch: Batch, weights: npt.NDArray[np.float32] | None = None
    ) -> EvalResult:
        """Loss and metrics of one micro-batch."""
        self._staging.fill(batch, weights)
        outputs = self._graph("eval").run(parameters)
        return EvalResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs))

    def infer(self, parameters: Vector, inputs: Half) -> dict[str, Array]:
        """The module's outputs, cut to the number of samples where dimension 0 is the micro-batch."""
        count = self._staging.fill_inputs(inputs)
        graph = self._graph("infer")
        outputs = graph.run(parameters)
        return {
            spec.name: (array[:count] if spec.shape[:1] == (self.manifest.micro_batch,) else array).copy()
            for spec, array in zip(graph.spec.outputs, outputs, strict=True)
        }

    def _metrics(self, outputs: list[Array]) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the metrics; what follows them are the gradients."""
        found = outputs[2 : 2 + len(self.manifest.metrics)]
        return {
            name: array.astype(np.float32) for name, array in zip(self.manifest.metrics, found, strict=True)
        }

    def _graph(self, name: str) -> _BoundGraph:
        if name not in self._bound:
            if name not in self._graphs:
                raise SessionError(
                    f"bundle {self.manifest.name!r} has no {name!r} graph for onnxruntime, only: "
                    f"{', '.join(self._graphs)}"
                )
            spec = self._graphs[name]
            loaded = load_graph(self._bundle, spec, threads=self._threads)
            self._bound[name] = _BoundGraph(
                spec, loaded, self.manifest.parameters, self._staging, self._outputs(name, spec)
            )
        return self._bound[name]

    def _outputs(self, name: str, spec: Graph) -> list[Array]:
        """Where the graph writes: `step`'s gradients into the flat vector, everything else to own buffers."""
        if name == "infer":
            return [np.zeros(output.shape, output.dtype) for output in spec.outputs]
        gradients: list[Array] = []
        if name == "step":
            gradients = [view(self._gradients, entry) for entry in self.manifest.parameters]
        own = 2 + len(self.manifest.metrics)
        if len(spec.outputs) != own + len(gradients):
            raise SessionError(
                f"{spec.file.file}: {len(spec.outputs)} outputs, but by the manifest "
                f"it should be {own + len(gradients)}"
            )
        return [np.zeros(output.shape, output.dtype) for output in spec.outputs[:own]] + gradients


class _BoundGraph:
    """A loaded graph with its inputs and outputs bound to our memory."""

    def __init__(
        self,
        spec: Graph,
        session: onnxruntime.InferenceSession,
        parameters: tuple[ParameterEntry, ...],
        staging: Staging,
        outputs: list[Array],
    ) -> None:
        self.spec = spec
        self._session = session
        self._binding = session.io_binding()
        self._outputs = outputs
        self._parameters: Vector | None = None
        self._entries = parameters
        self._num_parameters = sum(entry.numel for entry in parameters)
        # A graph has its parameters first, then those leaves that it needs.
        self._parameter_inputs = spec.inputs[: len(parameters)]
        for entry, declared in zip(parameters, self._parameter_inputs, strict=True):
            if declared.shape != entry.shape or declared.dtype != "float32":
                raise SessionError(
                    f"{spec.file.file}: input {declared.name!r} is not parameter {entry.name!r}"
                )
        for declared in spec.inputs[len(parameters) :]:
            array = staging.arrays.get(declared.name)
            if array is None or array.shape != declared.shape or array.dtype != declared.dtype:
                raise SessionError(f"{spec.file.file}: input {declared.name!r} is no leaf of the batch")
            self._binding.bind_cpu_input(declared.name, array)
        for declared, array in zip(spec.outputs, outputs, strict=True):
            if array.shape != declared.shape or array.dtype != declared.dtype:
                raise SessionError(f"{spec.file.file}: output {declared.name!r} has shape {declared.shape}")
            self._binding.bind_output(
                declared.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            )

    def run(self, parameters: Vector) -> list[Array]:
        """Runs on the staged batch; returns the outputs, which the next run overwrites."""
        if parameters is not self._parameters:
            check_vector(parameters, self._num_parameters)
            for entry, declared in zip(self._entries, self._parameter_inputs, strict=True):
                self._binding.bind_cpu_input(declared.name, view(parameters, entry))
            self._parameters = parameters
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            message = f"{self.spec.file.file}: {first_line(error)}"
            if re.search(r"out of (data )?bounds|out of range|outside", str(error)):
                raise DataError(f"an index in the batch is out of range: {message}") from error
            raise SessionError(f"the step failed in onnxruntime: {message}") from error
        return self._outputs


def view(vector: Vector, entry: ParameterEntry) -> Array:
    """One parameter of a flat vector, without a copy."""
    return vector[entry.offset : entry.offset + entry.numel].reshape(entry.shape)


def load_graph(bundle: Bundle, graph: Graph, *, threads: int) -> onnxruntime.InferenceSession:
    """Loads one verified graph and checks that it is the one that the manifest describes.

    Raises:
        SessionError: onnxruntime refuses the model, or it has other inputs or outputs.
        BundleError: a file is missing or corrupt.
    """
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    extra = [(Path(entry.file).name, bundle.read(entry)) for entry in graph.extra_files]
    if extra:
        options.add_external_initializers_from_files_in_memory(
            [name for name, _ in extra], [data for _, data in extra], [len(data) for _, data in extra]
        )
    data = bundle.read(graph.file)
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise SessionError(
            f"{bundle.path}: onnxruntime {onnxruntime.__version__} cannot load {graph.file.file}: "
            f"{first_line(error)}"
        ) from error
    for what, have, declared in (
        ("inputs", session.get_inputs(), graph.inputs),
        ("outputs", session.get_outputs(), graph.outputs),
    ):
        found = [(value.name, tuple(value.shape)) for value in have]
        if found != [(spec.name, spec.shape) for spec in declared]:
            raise SessionError(
                f"{bundle.path}: the {what} of {graph.file.file} are not the manifest's: {found}"
            )
    return session


def first_line(error: Exception) -> str:
    """The first line of an exception's text: onnxruntime appends C++ stack traces."""
    return str(error).strip().partition("\n")[0]


def parse_version(version: str) -> tuple[int, int]:
    """(major, minor) of "1.22.0", "1.22" or "1.23.0.dev2"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)

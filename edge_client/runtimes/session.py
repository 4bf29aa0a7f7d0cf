"""What the sessions of all runtimes share: staging the batch, the flat gradients, naming the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.base import Batch, ClippedStepResult, EvalResult, Half, StepResult, Vector
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.staging import Staging, check_vector
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import CLIP_NORM, STEP_CLIPPED, Graph, Manifest, ParameterEntry, TensorSpec


class BoundGraph(Protocol):
    """A loaded graph that reads the staged batch and writes to the outputs that it was bound to."""

    def run(self, parameters: Vector) -> None:
        """One call. `parameters` is float32 [num_parameters], checked."""
        ...


class GraphSession(ABC):
    """A `base.Session` of a runtime that says how one graph is loaded.

    `step` loads at once, `eval` and `infer` when first called: a client that never evaluates pays nothing.
    """

    def __init__(self, runtime: str, bundle: Bundle, *, threads: int) -> None:
        self.runtime = runtime
        self.manifest: Manifest = bundle.manifest
        self.bundle = bundle
        self.threads = threads
        self.staging = Staging(self.manifest)
        self.gradients: Vector = np.zeros(self.manifest.num_parameters, np.float32)
        self._graphs = self.manifest.program(runtime).graphs
        self._bound: dict[str, tuple[BoundGraph, list[Array]]] = {}
        self._load("step")

    @abstractmethod
    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph.

        Args:
            name: "step", "eval" or "infer".
            graph: its inputs and outputs are those of the manifest's contract.
            outputs: contiguous arrays to write to, one per output of the graph.

        Raises:
            SessionError: the runtime cannot load it.
        """

    def step(self, parameters: Vector, batch: Batch, weights: npt.NDArray[np.float32] | None = None) -> StepResult:
        """Loss and gradients of one micro-batch."""
        self.staging.fill(batch, weights)
        outputs = self._run("step", parameters)
        return StepResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs), self.gradients)

    def step_clipped(
        self, parameters: Vector, batch: Batch, weights: npt.NDArray[np.float32] | None = None, *, clip_norm: float
    ) -> ClippedStepResult:
        """As `step`, with every sample's gradient clipped before the sum."""
        count = self.staging.fill(batch, weights)
        self.staging.set_clip_norm(clip_norm)
        outputs = self._run(STEP_CLIPPED, parameters)
        norms = outputs[-1].astype(np.float32)[:count]
        return ClippedStepResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs), self.gradients, norms)

    def evaluate(self, parameters: Vector, batch: Batch, weights: npt.NDArray[np.float32] | None = None) -> EvalResult:
        """Loss and metrics of one micro-batch."""
        self.staging.fill(batch, weights)
        outputs = self._run("eval", parameters)
        return EvalResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs))

    def infer(self, parameters: Vector, inputs: Half) -> dict[str, Array]:
        """The module's outputs, cut to the number of samples where dimension 0 is the micro-batch."""
        count = self.staging.fill_inputs(inputs)
        outputs = self._run("infer", parameters)
        return {
            spec.name: (array[:count] if spec.shape[:1] == (self.manifest.micro_batch,) else array).copy()
            for spec, array in zip(self._graphs["infer"].outputs, outputs, strict=True)
        }

    def _run(self, name: str, parameters: Vector) -> list[Array]:
        check_vector(parameters, self.manifest.num_parameters)
        bound, outputs = self._load(name)
        bound.run(parameters)
        return outputs

    def _metrics(self, outputs: list[Array]) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the metrics; what follows them are the gradients."""
        found = outputs[2 : 2 + len(self.manifest.metrics)]
        return {name: array.astype(np.float32) for name, array in zip(self.manifest.metrics, found, strict=True)}

    def _load(self, name: str) -> tuple[BoundGraph, list[Array]]:
        if name not in self._bound:
            if name not in self._graphs:
                if name == STEP_CLIPPED:
                    raise SessionError(
                        f"bundle {self.manifest.name!r} was exported without per-sample clipping for {self.runtime}: "
                        "export it with --per-sample-clipping (per_sample_clipping=True)"
                    )
                raise SessionError(
                    f"bundle {self.manifest.name!r} has no {name!r} graph for {self.runtime}, only: "
                    f"{', '.join(self._graphs)}"
                )
            graph = self._graphs[name]
            check_inputs(self.manifest, graph)
            outputs = self._outputs(name, graph)
            self._bound[name] = self.bind(name, graph, outputs), outputs
        return self._bound[name]

    def _outputs(self, name: str, graph: Graph) -> list[Array]:
        """Where the graph writes: `step`'s gradients into the flat vector, everything else to own arrays."""
        if name == "infer":
            return [np.zeros(output.shape, output.dtype) for output in graph.outputs]
        gradients: list[Array] = []
        if name in {"step", STEP_CLIPPED}:
            gradients = [view(self.gradients, entry) for entry in self.manifest.parameters]
        own = 2 + len(self.manifest.metrics)
        further = 1 if name == STEP_CLIPPED else 0
        if len(graph.outputs) != own + len(gradients) + further:
            raise SessionError(
                f"{graph.file.file}: the manifest lists {len(graph.outputs)} outputs, but its metrics and "
                f"parameters make {own + len(gradients) + further}"
            )
        for declared, entry in zip(graph.outputs[own:], self.manifest.parameters, strict=False):
            if gradients and (declared.shape != entry.shape or declared.dtype != "float32"):
                raise SessionError(f"{graph.file.file}: {declared.name!r} is no gradient of {entry.name!r}")
        rest = graph.outputs[own + len(gradients) :]
        if rest and (rest[0].shape != (self.manifest.micro_batch,) or rest[0].dtype != "float32"):
            raise SessionError(f"{graph.file.file}: {rest[0].name!r} is not one norm per sample")
        made = [np.zeros(output.shape, output.dtype) for output in (*graph.outputs[:own], *rest)]
        return made[:own] + gradients + made[own:]


def check_inputs(manifest: Manifest, graph: Graph) -> None:
    """Checks that a graph takes the parameters, then leaves of the batch.

    Raises:
        SessionError: the manifest contradicts itself.
    """
    count = len(manifest.parameters)
    if len(graph.inputs) < count:
        raise SessionError(f"{graph.file.file}: {len(graph.inputs)} inputs, but {count} parameters")
    for entry, declared in zip(manifest.parameters, graph.inputs, strict=False):
        if declared.shape != entry.shape or declared.dtype != "float32":
            raise SessionError(f"{graph.file.file}: input {declared.name!r} is not parameter {entry.name!r}")
    batch = manifest.batch
    norm = TensorSpec(name=CLIP_NORM, dtype="float32", shape=())
    leaves = {leaf.name: leaf for leaf in (*batch.inputs.leaves, *batch.targets.leaves, batch.weights, norm)}
    for declared in graph.inputs[count:]:
        if leaves.get(declared.name) != declared:
            raise SessionError(f"{graph.file.file}: input {declared.name!r} is no leaf of the batch")


def view(vector: Vector, entry: ParameterEntry) -> Array:
    """One parameter of a flat vector, without a copy."""
    return vector[entry.offset : entry.offset + entry.numel].reshape(entry.shape)


def first_line(error: Exception) -> str:
    """The first line of an exception's text: the runtimes append C++ stack traces."""
    return str(error).strip().partition("\n")[0]

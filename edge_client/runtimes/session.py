"""What the sessions of all runtimes share: staging the batch, the flat gradients, naming the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.host.memory import give_back_memory
from edgetrain.edge_client.runtimes.base import (
    Batch,
    ClippedStepResult,
    EvalResult,
    Half,
    Parameters,
    Session,
    StepResult,
)
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters, any_in_int8
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.parts import PARTS, TRUNK, head_manifest, parameter_specs
from edgetrain.edge_client.runtimes.staging import Staging, check_vector
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.graph_names import FEATURE
from edgetrain.protocol.manifest import STEP_CLIPPED, Graph, Manifest, TensorSpec
from edgetrain.protocol.vectors import Vector


class BoundGraph(Protocol):
    """A loaded graph that reads the staged batch and writes to the outputs that it was bound to."""

    def run(self, parameters: Parameters) -> None:
        """One call. `parameters` is float32 [num_parameters], checked, or in int8 as the bundle is."""
        ...


class GraphSession(ABC):
    """A `base.Session` of a runtime that says how one graph is loaded.

    A graph loads when it is first called, those of `step` by `load`: a client that never evaluates pays nothing.
    """

    # Whether it can bind parameters in int8.
    takes_int8 = False
    # Of the products of a step.
    precision = "fp32"

    def __init__(self, runtime: str, bundle: Bundle, *, threads: int, head: bool = False) -> None:
        self.in_int8 = any_in_int8(bundle.manifest.parameters)
        if self.in_int8 and not self.takes_int8:
            raise SessionError(f"bundle {bundle.manifest.name!r} keeps weights in int8, which {runtime} cannot bind")
        self.runtime = runtime
        self.bundle = bundle
        self.threads = threads
        self._graphs = bundle.manifest.program(runtime).graphs
        self.manifest: Manifest = head_manifest(bundle.manifest, self._graphs) if head else bundle.manifest
        self.staging = Staging(self.manifest)
        if not head and TRUNK in self._graphs:
            self.staging.add(self._graphs[TRUNK].outputs)
        self.gradients: Vector = np.zeros(self.manifest.num_parameters, np.float32)
        self._bound: dict[str, tuple[BoundGraph, list[Array]]] = {}
        self._frugal = False
        # What `step` and `eval` run: the whole graph, or its parts in turn.
        in_parts = TRUNK in self._graphs and "step" not in self._graphs
        self._plans = {
            name: (part,) if head else (TRUNK, part) if in_parts else (name,) for name, part in PARTS.items()
        }

    @abstractmethod
    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph.

        Args:
            name: "step", "eval", "infer", "trunk", "head_step" or "head_eval".
            graph: its inputs and outputs are those of the manifest's contract.
            outputs: contiguous arrays to write to, one per output of the graph.

        Raises:
            SessionError: the runtime cannot load it.
        """

    def load(self) -> None:
        """Loads what `step` runs now and not at its first call."""
        for name in self._plans["step"]:
            self._load(name)

    def step(self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None) -> StepResult:
        """Loss and gradients of one micro-batch."""
        self.staging.fill(batch, weights)
        outputs = self._run("step", parameters)
        return StepResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs), self.gradients)

    def step_clipped(
        self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None, *, clip_norm: float
    ) -> ClippedStepResult:
        """As `step`, with every sample's gradient clipped before the sum."""
        count = self.staging.fill(batch, weights)
        self.staging.set_clip_norm(clip_norm)
        outputs = self._run(STEP_CLIPPED, parameters)
        norms = outputs[-1].astype(np.float32)[:count]
        return ClippedStepResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs), self.gradients, norms)

    def evaluate(
        self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None
    ) -> EvalResult:
        """Loss and metrics of one micro-batch."""
        self.staging.fill(batch, weights)
        outputs = self._run("eval", parameters)
        return EvalResult(float(outputs[0]), float(outputs[1]), self._metrics(outputs))

    def infer(self, parameters: Parameters, inputs: Half) -> dict[str, Array]:
        """The module's outputs, cut to the number of samples where dimension 0 is the micro-batch."""
        count = self.staging.fill_inputs(inputs)
        outputs = self._run("infer", parameters)
        return {
            spec.name: (array[:count] if spec.shape[:1] == (self.manifest.micro_batch,) else array).copy()
            for spec, array in zip(self._graphs["infer"].outputs, outputs, strict=True)
        }

    def features(self, inputs: Half) -> dict[str, Array]:
        """What the trunk makes of one micro-batch of inputs, [count, ...], fresh memory."""
        count = self.staging.fill_inputs(inputs)
        self._make_room((TRUNK,))
        bound, outputs = self._load(TRUNK)
        bound.run(self.gradients[:0])
        return {
            spec.name: array[:count].copy() for spec, array in zip(self._graphs[TRUNK].outputs, outputs, strict=True)
        }

    def save_memory(self, *, in_parts: bool) -> None:
        """Holds no more than the graphs of the last call, from now on: step and eval load anew when they take turns.

        Args:
            in_parts: run the trunk and the head in turn, where there are two, and never the whole step.
        """
        self._frugal = True
        if in_parts and TRUNK in self._graphs:
            self._plans = {name: (TRUNK, part) for name, part in PARTS.items()}
            self._bound.clear()
        give_back_memory()

    def release(self) -> None:
        """Gives the memory of all loaded graphs back; each loads again when it is called."""
        self._bound.clear()
        give_back_memory()

    def head(self) -> Session | None:
        """A session that trains on features, or None."""
        if TRUNK not in self._graphs:
            return None
        head = self.on_features()
        head.load()
        if self._frugal:
            head.save_memory(in_parts=False)
        return head

    def on_features(self) -> GraphSession:
        """A new session like this one, that trains on features."""
        return type(self)(self.runtime, self.bundle, threads=self.threads, head=True)

    def _run(self, name: str, parameters: Parameters) -> list[Array]:
        if isinstance(parameters, Int8Parameters):
            if not self.in_int8:
                raise DataError(f"bundle {self.manifest.name!r} keeps its parameters in float32: give a flat vector")
        else:
            check_vector(parameters, self.manifest.num_parameters)
            if self.in_int8:
                parameters = Int8Parameters(self.manifest.parameters, parameters)
        outputs: list[Array] = []
        plan = self._plans.get(name, (name,))
        self._make_room(plan)
        for part in plan:
            bound, outputs = self._load(part)
            bound.run(parameters)
        return outputs

    def _metrics(self, outputs: list[Array]) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the metrics; what follows them are the gradients."""
        found = outputs[2 : 2 + len(self.manifest.metrics)]
        return {name: array.astype(np.float32) for name, array in zip(self.manifest.metrics, found, strict=True)}

    def _make_room(self, plan: tuple[str, ...]) -> None:
        if self._frugal and not self._bound.keys() <= set(plan):
            self.release()

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
            check_inputs(self.manifest, graph, self.staging.specs)
            outputs = self._outputs(name, graph)
            self._bound[name] = self.bind(name, graph, outputs), outputs
            if self._frugal:
                # What loading took, which is not what running takes.
                give_back_memory()
        return self._bound[name]

    def _outputs(self, name: str, graph: Graph) -> list[Array]:
        """Where the graph writes: gradients into the flat vector, features to the batch, the rest to own arrays."""
        if name == TRUNK:
            for output in graph.outputs:
                if not output.name.startswith(FEATURE):
                    raise SessionError(f"{graph.file.file}: output {output.name!r} of the trunk is no feature")
            return [self.staging.arrays[output.name] for output in graph.outputs]
        if name == "infer":
            return [np.zeros(output.shape, output.dtype) for output in graph.outputs]
        gradients: list[Array] = []
        if name in {"step", PARTS["step"], STEP_CLIPPED}:
            gradients = [entry.of(self.gradients) for entry in self.manifest.parameters]
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


def check_inputs(manifest: Manifest, graph: Graph, leaves: Mapping[str, TensorSpec]) -> None:
    """Checks that a graph takes the parameters, then what the staged batch holds.

    Raises:
        SessionError: the manifest contradicts itself.
    """
    specs = parameter_specs(manifest, graph)
    if len(graph.inputs) < len(specs):
        raise SessionError(f"{graph.file.file}: {len(graph.inputs)} inputs, but {len(specs)} parameters")
    for (name, dtype, shape), declared in zip(specs, graph.inputs, strict=False):
        if declared.shape != shape or declared.dtype != dtype:
            raise SessionError(f"{graph.file.file}: input {declared.name!r} is not parameter {name!r}")
    for declared in graph.inputs[len(specs) :]:
        if leaves.get(declared.name) != declared:
            raise SessionError(f"{graph.file.file}: input {declared.name!r} is no leaf of the batch")


def first_line(error: Exception) -> str:
    """The first line of an exception's text: the runtimes append C++ stack traces."""
    return str(error).strip().partition("\n")[0]

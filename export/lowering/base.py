"""The seam between traced graphs and runtimes: one lowering per runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgetrain.export.graph.decompositions import Decompositions
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.graph.partition import Split
from edgetrain.protocol.manifest import TensorSpec

Array = npt.NDArray[np.generic]
Weights = Literal["float32", "float16", "int8"]
"""How frozen weights are stored one by one."""

Run = Callable[[Sequence[Array]], list[Array]]
"""Runs a lowered graph: arrays in the order of its inputs -> arrays in the order of its outputs."""


@dataclass(frozen=True)
class LoweredGraph:
    """One graph as the runtime loads it."""

    # File name inside the runtime's folder of the bundle, and contents.
    file: str
    data: bytes
    # Further files that the program loads by relative path.
    extra: dict[str, bytes] = field(default_factory=dict)
    # Bytes of activations that the runtime plans for one call, where the lowering knows it.
    planned_memory: int | None = None
    # What it takes, if that is not what the traced graph takes.
    inputs: tuple[TensorSpec, ...] | None = None


class Lowering(Protocol):
    """How graphs become programs of one runtime. Plain data and pure functions; holds no state."""

    @property
    def runtime(self) -> str:
        """As in the manifest."""
        ...

    @property
    def minimum_version(self) -> str:
        """The oldest version of the runtime that can run what `lower` writes."""
        ...

    @property
    def narrows(self) -> bool:
        """Whether rows that nothing reads are left out of its graphs; see `edgetrain.export.graph.narrow`."""
        ...

    @property
    def splits(self) -> bool:
        """Whether the runtime's sessions can run a step in two parts; see `edgetrain.export.graph.partition`."""
        ...

    def available(self) -> str | None:
        """None if graphs can be lowered and run here, else the reason and the remedy."""
        ...

    def decompositions(self) -> Decompositions:
        """The operators that are to be taken apart while tracing."""
        ...

    def lower(self, graph: TracedGraph) -> LoweredGraph:
        """Translates one graph. The same graph gives the same bytes.

        Raises:
            UnsupportedError: an operator that the runtime has no translation for.
        """
        ...

    def load(self, lowered: LoweredGraph) -> Run:
        """Loads a lowered graph in the real runtime, one thread, to prove it."""
        ...


@runtime_checkable
class FurtherGraphs(Protocol):
    """A lowering that makes more of the step than the step."""

    def further_graphs(self, step: TracedGraph) -> Sequence[TracedGraph]:
        """Graphs that compute what the step computes, under names of their own; they are lowered and proven too."""
        ...


@runtime_checkable
class StoringLowering(Lowering, Protocol):
    """A lowering that can store the frozen part in fewer bytes."""

    def cannot_store(self, kind: str) -> str | None:
        """None if frozen weights can be stored as a kind of `Storage`, else the reason and the remedy."""
        ...

    def weights(self, kind: str) -> Weights:
        """How weights are stored that are not in a quantized trunk, for a kind of `Storage`."""
        ...

    def stored_as(self, names: Sequence[str], kind: str, parts: Split | None) -> dict[str, str]:
        """Which frozen tensors are stored in fewer bytes, and as what.

        Args:
            names: of those that are large enough to be worth it.
            kind: of `Storage`.
            parts: trunk and head, if the program is split.
        """
        ...

    def store(self, lowered: LoweredGraph, kind: str) -> LoweredGraph:
        """The same program, with weights that were rounded to `kind` in fewer bytes and as exact."""
        ...

    def quantize_trunk(
        self, trunk: TracedGraph, lowered: LoweredGraph, kind: str, batches: Sequence[Sequence[Array]]
    ) -> LoweredGraph:
        """The trunk in integer arithmetic.

        Args:
            trunk: the traced graph.
            lowered: its program in float32.
            kind: "int8-static" or "int8-dynamic".
            batches: calibration data, the trunk's inputs in order.

        Raises:
            UnsupportedError: it cannot be quantized.
        """
        ...

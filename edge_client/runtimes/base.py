"""The seam between the local trainer and whatever runs the graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Manifest
from edgetrain.protocol.vectors import Vector

Parameters = Vector | Int8Parameters
"""What a session computes with: a flat vector, or the same with weights in int8 if the bundle keeps them so."""

Half = npt.NDArray[np.generic] | tuple[npt.NDArray[np.generic], ...] | Mapping[str, npt.NDArray[np.generic]]
"""The inputs or the targets of a batch, in the structure of the example batch."""

Batch = tuple[Half, Half]
"""`(inputs, targets)`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Weighted sums over one micro-batch. Divide by `weight_sum` after adding as many as you like."""

    loss_sum: float
    weight_sum: float
    # Weighted sums too, by name; a float or a small vector (e.g. per-class counts).
    metrics: dict[str, npt.NDArray[np.float32]]
    # [num_parameters]. A view that the next `step` overwrites: add it up or copy it.
    gradients: Vector


@dataclass(frozen=True, slots=True)
class ClippedStepResult:
    """As `StepResult`, with every sample's gradient clipped before the sum."""

    loss_sum: float
    weight_sum: float
    metrics: dict[str, npt.NDArray[np.float32]]
    # [num_parameters]: the sum of the clipped gradients. A view that the next step overwrites.
    gradients: Vector
    # [batch]: the norm of each sample's gradient before it was clipped; without the padding.
    norms: Vector


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Weighted sums over one micro-batch, without gradients."""

    loss_sum: float
    weight_sum: float
    metrics: dict[str, npt.NDArray[np.float32]]


class Session(Protocol):
    """One bundle, opened on one runtime. Not thread-safe."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        ...

    @property
    def runtime(self) -> str:
        """Name of the runtime."""
        ...

    @property
    def precision(self) -> str:
        """What the products of a step are computed in: "fp32", "fp16" or "bf16"."""
        ...

    def load(self) -> None:
        """Loads what `step` runs now and not at its first call: what cannot be loaded is found out.

        Raises:
            SessionError: the runtime cannot load it.
            BundleError: a file is missing or corrupt.
        """
        ...

    def step(self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None) -> StepResult:
        """Loss and gradients of one micro-batch.

        Args:
            parameters: float32 [num_parameters]; weights that the bundle keeps in int8 are rounded to the nearest.
            batch: numpy in the example batch's structure; dimension 0 is at most the micro-batch. A smaller
                one is padded with weight 0.
            weights: float32 [B] or, for losses per token, [B, T] (a [B] is then broadcast); ones if left out.

        Raises:
            DataError: a wrong structure, shape, dtype, or a value that is not finite.
        """
        ...

    def step_clipped(
        self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None, *, clip_norm: float
    ) -> ClippedStepResult:
        """As `step`, with the gradient of each sample's weighted loss clipped to a norm before the sum.

        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016.

        Args:
            parameters: as in `step`.
            batch: as in `step`.
            weights: as in `step`.
            clip_norm: largest L2 norm of a sample's gradient over all parameters, above 0.

        Raises:
            SessionError: the bundle was exported without per-sample clipping.
            DataError: as in `step`, or a `clip_norm` that is not above 0.
        """
        ...

    def evaluate(
        self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None
    ) -> EvalResult:
        """Loss and metrics of one micro-batch. Arguments and errors as in `step`."""
        ...

    def infer(self, parameters: Parameters, inputs: Half) -> dict[str, npt.NDArray[np.generic]]:
        """The module's outputs for one micro-batch of inputs, by output name."""
        ...

    def features(self, inputs: Half) -> dict[str, npt.NDArray[np.generic]]:
        """The trunk's outputs for one micro-batch of inputs, by name, [count, ...]. They depend on no parameter.

        Raises:
            SessionError: the program is not split.
        """
        ...

    def save_memory(self, *, in_parts: bool) -> None:
        """Holds no more than the graphs of the last call, from now on: step and eval load anew when they take turns.

        Args:
            in_parts: run the trunk and the head in turn, where the program is split, and never the whole step.
        """
        ...

    def release(self) -> None:
        """Gives the memory of all loaded graphs back; each loads again when it is called."""
        ...

    def head(self) -> Session | None:
        """A session that trains on features: `manifest.batch.inputs` of it are these and what else it reads.

        It holds only the graphs that learn. None if the program is not split, so that there is no trunk.
        """
        ...


@runtime_checkable
class Runtime(Protocol):
    """A backend. Registered under the entry-point group `edgetrain.runtimes` by a class without arguments."""

    @property
    def name(self) -> str:
        """As in the manifest's programs."""
        ...

    def available(self) -> str | None:
        """None if it can run here, else the reason and the remedy, e.g. the pip line."""
        ...

    def open(self, bundle: Bundle, *, threads: int) -> Session:
        """Opens the bundle's program for this runtime; its graphs may wait for `Session.load` or their first call.

        Args:
            bundle: opened and of a known version; the files are verified when read.
            threads: number of threads of one step; 0 lets the runtime choose.

        Raises:
            SessionError: not installed, too old, or a graph that is loaded already does not load.
            BundleError: no program for this runtime, or a corrupt file.
        """
        ...


@runtime_checkable
class MixedPrecisionRuntime(Runtime, Protocol):
    """A backend that computes the products of a step in fewer bits, too."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of "fp32", "fp16" and "bf16" those that it can."""
        ...

    def open(self, bundle: Bundle, *, threads: int, precision: str = "fp32") -> Session:
        """See `Runtime`; `precision` is one of `precisions`."""
        ...


BundlePath = str | os.PathLike[str]

"""The reference runtime: the same step graph in torch, for comparing and for machines that have it.

The program is the traced step as `torch.export` saves it (`.pt2`), in operators that torch does not take
apart. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import DataError, SessionError
from edgetrain.edge_client.runtimes.base import Batch, Parameters, StepResult
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.parts import num_parameters
from edgetrain.edge_client.runtimes.session import BoundGraph, GraphSession, first_line
from edgetrain.edge_client.runtimes.torch_precision import PRECISIONS, LossScale, in_low_precision
from edgetrain.edge_client.runtimes.versions import check_minimum
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Graph, Manifest
from edgetrain.protocol.vectors import Vector

if TYPE_CHECKING:
    import torch

    Program = Callable[..., tuple[torch.Tensor, ...]]


class TorchRuntime:
    """Torch on the CPU."""

    name = "torch"
    precisions = PRECISIONS

    def available(self) -> str | None:
        """None if torch is installed, else the pip line. Does not import it, which takes seconds."""
        if importlib.util.find_spec("torch") is None:
            return "runtime torch is not installed: pip install torch"
        return None

    def open(self, bundle: Bundle, *, threads: int, precision: str = "fp32") -> TorchSession:
        """Opens the bundle's program for torch, its products in `precision`; nothing is loaded yet.

        `threads` is set for the whole process: torch knows no other way.

        Raises:
            SessionError: too old.
            BundleError: no program for this runtime.
        """
        import torch

        check_minimum(bundle.manifest, self.name, torch.__version__, "torch")
        if threads:
            torch.set_num_threads(threads)
        return TorchSession(self.name, bundle, threads=threads, precision=precision)


class TorchSession(GraphSession):
    """One bundle on torch. See `base.Session`."""

    def __init__(
        self, runtime: str, bundle: Bundle, *, threads: int, head: bool = False, precision: str = "fp32"
    ) -> None:
        self.precision = precision
        self._scale = LossScale() if precision == "fp16" else None
        super().__init__(runtime, bundle, threads=threads, head=head)

    def on_features(self) -> TorchSession:
        """A new session like this one, that trains on features."""
        return TorchSession(self.runtime, self.bundle, threads=self.threads, head=True, precision=self.precision)

    def step(self, parameters: Parameters, batch: Batch, weights: npt.NDArray[np.float32] | None = None) -> StepResult:
        """Loss and gradients of one micro-batch; with fp16, of scaled weights."""
        if self._scale is None:
            return super().step(parameters, batch, weights)
        staged = self.staging.arrays[self.manifest.batch.weights.name]
        while True:
            self.staging.fill(batch, weights)
            scale = np.float32(self._scale.value)
            np.multiply(staged, scale, out=staged)
            outputs = self._run("step", parameters)
            if np.isfinite(self.gradients).all():
                self._scale.succeeded()
                break
            if not self._scale.overflowed():
                break
        np.divide(self.gradients, scale, out=self.gradients)
        metrics = {name: value / scale for name, value in self._metrics(outputs).items()}
        return StepResult(float(outputs[0]) / float(scale), float(outputs[1]) / float(scale), metrics, self.gradients)

    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph."""
        del name
        import torch

        try:
            program = torch.export.load(io.BytesIO(self.bundle.read(graph.file)))
            module: Program = program.module()
            if self.precision != "fp32":
                module = in_low_precision(program.module(check_guards=False), self.precision)
        except Exception as error:  # whatever unpickling, unzipping and checking the program raise
            raise SessionError(
                f"{self.bundle.path}: torch {torch.__version__} cannot load {graph.file.file}: {first_line(error)}"
            ) from error
        return _TorchGraph(module, graph, self.manifest, self.staging.arrays, outputs)


class _TorchGraph:
    """A loaded program with the staged batch as tensors that share its memory."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        manifest: Manifest,
        leaves: dict[str, Array],
        outputs: list[Array],
    ) -> None:
        import torch

        self._program = program
        self._file = graph.file.file
        self._entries = manifest.parameters[: num_parameters(manifest, graph)]
        self._leaves = [torch.from_numpy(leaves[spec.name]) for spec in graph.inputs[len(self._entries) :]]
        self._outputs = outputs
        self._bound: Vector | None = None
        self._parameters: list[torch.Tensor] = []

    def run(self, parameters: Parameters) -> None:
        """One call; see `BoundGraph`."""
        assert isinstance(parameters, np.ndarray), "refused when opened"
        import torch

        if parameters is not self._bound:
            # torch refuses to share memory that it may not write to.
            shared = parameters if parameters.flags.writeable else parameters.copy()
            self._parameters = [torch.from_numpy(entry.of(shared)) for entry in self._entries]
            self._bound = parameters if shared is parameters else None
        try:
            with torch.no_grad():
                results = self._program(*self._parameters, *self._leaves)
        except IndexError as error:
            raise DataError(f"an index in the batch is out of range: {self._file}: {first_line(error)}") from error
        except RuntimeError as error:
            if "out of bounds" in str(error) or "out of range" in str(error):
                raise DataError(f"an index in the batch is out of range: {self._file}: {first_line(error)}") from error
            raise SessionError(f"torch failed in {self._file}: {first_line(error)}") from error
        for array, result in zip(self._outputs, results, strict=True):
            np.copyto(array, result.numpy())

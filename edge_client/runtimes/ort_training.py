"""The runtime of onnxruntime-training 1.19.2, the last release of onnxruntime's own training build.

Its `step` is the training graph that `generate_artifacts` writes: onnxruntime differentiated the forward pass
itself and fused the result, which often makes it the fastest of our runtimes. It is run through an ordinary
inference session: the training graph ends in gradient accumulators that add to, or replace, a buffer which
is given as an input, so with a view of our flat gradient vector as that buffer nothing is copied.

The package owns the module name `onnxruntime` too: install it in an environment of its own. It is used
without its Python front end, which imports torch.
"""

from __future__ import annotations

import numpy as np

from edgetrain.edge_client.errors import SessionError
from edgetrain.edge_client.runtimes.leaves import Array
from edgetrain.edge_client.runtimes.onnxruntime import OnnxGraph, OnnxSession, load_model
from edgetrain.edge_client.runtimes.session import BoundGraph
from edgetrain.edge_client.runtimes.versions import check_minimum
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Graph
from edgetrain.protocol.ort_training import BUFFER_SUFFIX, RESET_INPUT

INSTALL = "in an environment without onnxruntime: pip install onnxruntime-training-cpu==1.19.2"


class OrtTrainingRuntime:
    """Onnxruntime's training build on the CPU."""

    name = "ort-training"

    def available(self) -> str | None:
        """None if the training build is here, else the reason and the pip line."""
        try:
            import onnxruntime
            from onnxruntime.capi import _pybind_state
        except ImportError:
            return f"runtime ort-training is not installed; {INSTALL}"
        if not hasattr(_pybind_state, "GradientGraphBuilder"):
            return f"onnxruntime {onnxruntime.__version__} here is not the training build; {INSTALL}"
        return None

    def open(self, bundle: Bundle, *, threads: int) -> OrtTrainingSession:
        """Opens the bundle's program for the training build; nothing is loaded yet.

        Raises:
            SessionError: too old, or it cannot bind parameters as the bundle keeps them.
            BundleError: no program for this runtime.
        """
        import onnxruntime

        check_minimum(bundle.manifest, self.name, onnxruntime.__version__, "onnxruntime-training-cpu")
        return OrtTrainingSession(self.name, bundle, threads=threads)


class OrtTrainingSession(OnnxSession):
    """One bundle on onnxruntime's training build. See `base.Session`; `eval` and `infer` are plain ONNX."""

    takes_int8 = False

    def bind(self, name: str, graph: Graph, outputs: list[Array]) -> BoundGraph:
        """Loads a graph and binds our memory to it."""
        if name != "step":
            return super().bind(name, graph, outputs)
        session = load_model(self.bundle, graph.file, threads=self.threads)
        takes = {value.name for value in session.get_inputs()}
        gives = {value.name for value in session.get_outputs()}
        count = len(self.manifest.parameters)
        own = len(outputs) - count
        named = {spec.name: array for spec, array in zip(graph.outputs[:own], outputs[:own], strict=True)}
        if RESET_INPUT not in takes or not named.keys() <= gives:
            raise SessionError(
                f"{self.bundle.path}: the outputs of {graph.file.file} are not the manifest's: {sorted(gives)}"
            )
        bound = OnnxGraph(session, graph, self.manifest, self.staging.arrays)
        for output, array in named.items():
            bound.bind_output(output, array)
        for flag in gives - named.keys():
            # Each accumulator says that it has run: nobody asks.
            bound.binding.bind_output(flag)
        for spec, gradient in zip(graph.inputs[:count], outputs[own:], strict=True):
            # A parameter that the loss does not depend on has no buffer, and a gradient of zero.
            if spec.name + BUFFER_SUFFIX in takes:
                bound.binding.bind_cpu_input(spec.name + BUFFER_SUFFIX, gradient)
        # Always replace what is in the buffer: the trainer adds up by itself.
        bound.binding.bind_cpu_input(RESET_INPUT, np.array([True]))
        return bound

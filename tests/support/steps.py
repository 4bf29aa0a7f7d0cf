"""A step graph alone, lowered for onnxruntime: what most gradient tests need of an export."""

from __future__ import annotations

import numpy as np
import onnx

from edgetrain.export.batch import read_example
from edgetrain.export.exporter import make_problem
from edgetrain.export.graph.functional import functional_problem
from edgetrain.export.graph.joint import trace_step
from edgetrain.export.lowering.onnx import OnnxLowering
from edgetrain.export.prepare import prepare
from edgetrain.export.program import Translator
from support.bundles import eager_step


class Step:
    """The step of a module in onnxruntime, and in eager torch."""

    def __init__(self, module, loss, batch, trainable="all", functional=False):
        problem = make_problem(prepare(module, trainable), loss, read_example(batch, None))
        lowering = OnnxLowering()
        translator = Translator(lowering, functional_problem(problem) if functional else problem)
        graph, lowered = translator.translate(trace_step)
        self.names = problem.names
        self.model = onnx.load_from_string(lowered.data)
        self.ops = [node.op_type for node in self.model.graph.node]
        self._graph, self._run = graph, lowering.load(lowered)
        self._problem = problem
        self._eager = (module, loss, batch)

    def run(self):
        arrays = self._run([tensor.numpy() for tensor in self._graph.example])
        return {spec.name: array for spec, array in zip(self._graph.outputs, arrays, strict=True)}

    def assert_matches_eager(self, rtol=1e-4, floor=2e-6):
        """Every gradient against autograd on the user's own module."""
        got = self.run()
        total, grads = eager_step(*self._eager, self._problem.weights)
        np.testing.assert_allclose(got["loss_sum"], total, rtol=1e-4, atol=1e-6)
        largest = max(np.abs(grads[name]).max() for name in self.names)
        for name in self.names:
            want = grads[name]
            error = np.abs(got[f"gradients.{name}"] - want).max()
            assert error <= rtol * np.abs(want).max() + floor * largest, (name, error, np.abs(want).max())

"""Training graphs by onnxruntime-training: it differentiates the forward graph by itself.

The forward graph goes through the same exporter as for plain onnxruntime. `generate_artifacts` then adds the
backward pass, in the environment of onnxruntime-training, which cannot be this one
(`ort_training_worker.py`). That environment is found by

- the variable EDGETRAIN_ORT_TRAINING_PYTHON, the path of its Python, or
- a folder `.venv-ort-training` in the working directory or beside the running environment. `scripts/test`
  makes one; by hand: `python -m venv .venv-ort-training` and in it
  `pip install onnxruntime-training-cpu==1.19.2`.

The program's `step` is the training graph. Beside it lie what onnxruntime's own training loop needs: the
nominal checkpoint (names and shapes, no values) and the graph of its SGD.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch._decomp import get_decompositions

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph.before_autograd import COMPOSITES
from edgetrain.export.graph.decompositions import Decompositions, common
from edgetrain.export.graph.joint import TracedGraph
from edgetrain.export.lowering.base import Array, LoweredGraph, Run
from edgetrain.export.lowering.onnx import OnnxLowering
from edgetrain.protocol.graph_names import PARAMETER
from edgetrain.protocol.ort_training import BUFFER_SUFFIX, CHECKPOINT_FILE, OPTIMIZER_FILE, RESET_INPUT

PYTHON_VARIABLE = "EDGETRAIN_ORT_TRAINING_PYTHON"
ENVIRONMENT = ".venv-ort-training"
WORKER = Path(__file__).with_name("ort_training_worker.py")

_NORMALIZATIONS = (
    torch.ops.aten.native_group_norm,
    torch.ops.aten.native_batch_norm,
    torch.ops.aten._native_batch_norm_legit_no_training,  # noqa: SLF001
)


class OrtTrainingLowering:
    """See `edgetrain.export.lowering.base.Lowering`."""

    runtime = "ort-training"
    minimum_version = "1.19"
    narrows = True
    splits = False

    def available(self) -> str | None:
        """None, or how to get the second environment."""
        return _check(_python())

    def decompositions(self) -> Decompositions:
        """Takes apart what has no gradient there, or another one than in torch."""
        table = common()
        attention = torch.ops.aten.scaled_dot_product_attention.default
        table[attention] = COMPOSITES[attention]
        table[torch.ops.aten.hardtanh.default] = _hardtanh
        table.update(get_decompositions([*_NORMALIZATIONS]))  # type: ignore[arg-type]
        return table

    def lower(self, graph: TracedGraph) -> LoweredGraph:
        """The step as a training graph; the other graphs as plain ONNX."""
        if graph.forward is None:
            return OnnxLowering().lower(graph)
        forward = graph.forward(self.decompositions())
        # The largest of a row, which the rewrite for onnxruntime brings, has no gradient there.
        plain = OnnxLowering(rewrite=lambda module: module)
        model = onnx.load_from_string(plain.lower(forward).data)
        names = [spec.name for spec in forward.inputs if spec.name.startswith(PARAMETER)]
        values = [value.numpy() for value in forward.example[: len(names)]]
        reachable = _ancestors(model, "loss_sum")
        _parameters_to_initializers(model, dict(zip(names, values, strict=True)))
        _add_statistics(model)
        _unshare_norms(model)
        plan = {
            "requires_grad": [name for name in names if name in reachable],
            "frozen": [name for name in names if name not in reachable],
        }
        with tempfile.TemporaryDirectory(prefix="edgetrain-") as temporary:
            folder = Path(temporary)
            (folder / "forward.onnx").write_bytes(model.SerializeToString())
            (folder / "plan.json").write_text(json.dumps(plan))
            _call_worker("generate", folder)
            return LoweredGraph(
                file=f"{graph.name}.onnx",
                data=(folder / "training_model.onnx").read_bytes(),
                extra={
                    CHECKPOINT_FILE: (folder / "nominal_checkpoint").read_bytes(),
                    OPTIMIZER_FILE: (folder / "optimizer_model.onnx").read_bytes(),
                },
            )

    def load(self, lowered: LoweredGraph) -> Run:
        """Runs in the second environment, one process per call."""
        model = onnx.load_from_string(lowered.data)
        constants = {initializer.name for initializer in model.graph.initializer}
        takes = [value.name for value in model.graph.input if value.name not in constants]
        parameters = [name for name in takes if name.startswith(PARAMETER) and BUFFER_SUFFIX not in name]
        leaves = [name for name in takes if not name.startswith(PARAMETER) and name != RESET_INPUT]
        trains = any(name.endswith(BUFFER_SUFFIX) for name in takes)
        gives = [value.name for value in model.graph.output if ".accumulation." not in value.name]

        def run(arrays: Sequence[Array]) -> list[Array]:
            with tempfile.TemporaryDirectory(prefix="edgetrain-") as temporary:
                folder = Path(temporary)
                (folder / "model.onnx").write_bytes(lowered.data)
                names = [*parameters, *leaves]
                np.savez(folder / "inputs.npz", **dict(zip(names, arrays, strict=True)))
                _call_worker("run", folder)
                with np.load(folder / "outputs.npz") as loaded:
                    found = dict(loaded)
            results = [found[name] for name in gives]
            if trains:
                pairs = zip(parameters, arrays, strict=False)
                results += [found.get(name + BUFFER_SUFFIX, 0 * array) for name, array in pairs]
            return results

        return run


def _hardtanh(x: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0) -> torch.Tensor:
    """Also ReLU6. As a Clip, its gradient at exactly the bounds would be 1, in torch it is 0.

    Exact zeros are not rare: the background of an image, before the biases have learned anything.
    """
    x = torch.where(x <= min_val, min_val, x)
    return torch.where(x >= max_val, max_val, x)


def _ancestors(model: onnx.ModelProto, output: str) -> set[str]:
    """Names of all values that an output depends on."""
    seen = {output}
    for node in reversed(model.graph.node):  # in topological order, as ONNX demands
        if seen & set(node.output):
            seen |= set(node.input)
    return seen


def _parameters_to_initializers(model: onnx.ModelProto, values: dict[str, Array]) -> None:
    """`generate_artifacts` looks for parameters among the initializers."""
    inputs = [value for value in model.graph.input if value.name not in values]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())


def _add_statistics(model: onnx.ModelProto) -> None:
    """The gradient of a layer norm needs its mean and deviation, which are optional outputs."""
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and len(node.output) == 1:
            node.output.extend([f"{node.output[0]}.mean", f"{node.output[0]}.inverse_deviation"])


def _unshare_norms(model: onnx.ModelProto) -> None:
    """A layer norm's gradient has one for its scale and shift, frozen or not, named after them.

    Two layer norms with equal constants would share one, and define that name twice. What could be given as an input
    is not taken for a constant there, so copies stay copies.
    """
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "LayerNormalization":
            continue
        for place, name in enumerate(node.input):
            if name in taken and name in constants and not name.startswith(PARAMETER):
                copy = model.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[place] = f"{name}.{len(model.graph.initializer)}"
                model.graph.input.append(onnx.helper.make_tensor_value_info(copy.name, copy.data_type, copy.dims))
            taken.add(name)


def _python() -> Path | None:
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        return Path(named)
    for folder in (Path.cwd(), Path(sys.prefix).parent):
        python = folder / ENVIRONMENT / "bin" / "python"
        if python.is_file():
            return python
    return None


@functools.cache
def _check(python: Path | None) -> str | None:
    remedy = (
        f"make an environment {ENVIRONMENT} with onnxruntime-training-cpu==1.19.2, or set "
        f"{PYTHON_VARIABLE} to the Python of one"
    )
    if python is None:
        return f"it is exported by onnxruntime-training, in an environment of its own: {remedy}"
    try:
        _run_worker(python, "check")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{python} has no working onnxruntime-training ({_last_line(error)}): {remedy}"
    return None


def _call_worker(command: str, folder: Path) -> None:
    python = _python()
    assert python is not None  # `available` was asked
    try:
        _run_worker(python, command, str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnsupportedError(
            f"onnxruntime-training cannot {command} this graph: {_last_line(error)}. An operator without a "
            "gradient there is the usual reason: export for onnxruntime instead, or freeze what needs it"
        ) from error


def _run_worker(python: Path, *arguments: str) -> None:
    # Nothing of this environment may reach the other. A fixed hash seed, since `generate_artifacts` walks
    # sets of names: without it no two exports would be alike.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run(  # noqa: S603 - our own worker
        [str(python), "-P", "-s", str(WORKER), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONHASHSEED": "0"},
    )


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return text.strip().rpartition("\n")[2]

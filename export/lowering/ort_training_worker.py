"""Runs in the environment of onnxruntime-training, on behalf of `ort_training.py`. Imports nothing of ours.

    python ort_training_worker.py check
    python ort_training_worker.py generate FOLDER    reads forward.onnx and plan.json, writes the artifacts
    python ort_training_worker.py run FOLDER         reads model.onnx and inputs.npz, writes outputs.npz

The two packages `onnxruntime` and `onnxruntime-training-cpu` cannot live in one environment, so this one step
of an export takes a process of its own.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

# What onnxruntime 1.19 reads.
IR_VERSION = 10


def main() -> None:
    """Does what the command line says."""
    command = sys.argv[1]
    if command == "check":
        _artifacts()
    elif command == "generate":
        generate(Path(sys.argv[2]))
    else:
        run(Path(sys.argv[2]))


def generate(folder: Path) -> None:
    """Lets onnxruntime differentiate the forward graph."""
    artifacts = _artifacts()
    plan = json.loads((folder / "plan.json").read_text())
    artifacts.generate_artifacts(
        onnx.load(folder / "forward.onnx"),
        requires_grad=plan["requires_grad"],
        frozen_params=plan["frozen"],
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=str(folder),
        nominal_checkpoint=True,
    )
    # It is saved with the IR version of the installed onnx, which the runtime may not read.
    optimizer = onnx.load(folder / "optimizer_model.onnx")
    optimizer.ir_version = IR_VERSION
    onnx.save(optimizer, folder / "optimizer_model.onnx")


def run(folder: Path) -> None:
    """Runs a graph on arrays in the order of the manifest: parameters, leaves, weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    with np.load(folder / "inputs.npz") as loaded:
        feeds = dict(loaded)
    buffers = {}
    for value in session.get_inputs():
        if value.name == "lazy_reset_grad":
            feeds[value.name] = np.array([True])
        elif value.name.endswith(".accumulation.buffer"):
            # An input that is written to: this is where the gradient comes out.
            buffers[value.name] = feeds[value.name] = np.zeros(value.shape, np.float32)
    takes = {value.name for value in session.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in takes}
    outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
    np.savez(folder / "outputs.npz", allow_pickle=False, **outputs, **buffers)


def _artifacts() -> types.ModuleType:
    """`onnxruntime.training.artifacts`, without the package's own `__init__`, which imports torch."""
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
    sys.modules[package.__name__] = package
    from onnxruntime.training import artifacts  # noqa: PLC0415

    return artifacts  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()

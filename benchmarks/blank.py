"""A bundle that nobody runs: so many parameters of zero, for benchmarks of the coordinator alone."""

from __future__ import annotations

from pathlib import Path

from edgetrain.protocol.bundle import file_entry, write_bundle
from edgetrain.protocol.manifest import (
    BatchSpec,
    GradientCheck,
    Graph,
    Manifest,
    ParameterEntry,
    Program,
    SelfTest,
    Structure,
    TensorSpec,
)


def write_blank_bundle(out: Path, num_parameters: int) -> Path:
    """Writes it."""
    files = {"parameters.bin": bytes(4 * num_parameters), "self_test.bin": bytes(16), "step.onnx": b"nobody runs this"}
    x = TensorSpec(name="inputs", dtype="float32", shape=(1, 1))
    y = TensorSpec(name="targets", dtype="int64", shape=(1,))
    w = TensorSpec(name="weights", dtype="float32", shape=(1,))
    parameters = TensorSpec(name="weight", dtype="float32", shape=(num_parameters,))
    scalars = tuple(TensorSpec(name=name, dtype="float32", shape=()) for name in ("loss_sum", "weight_sum"))
    gradients = TensorSpec(name="grad:weight", dtype="float32", shape=(num_parameters,))
    graph = Graph(
        file=file_entry("step.onnx", files["step.onnx"]),
        inputs=(parameters, x, y, w),
        outputs=(*scalars, gradients),
    )
    manifest = Manifest(
        name="blank",
        producer="benchmark",
        micro_batch=1,
        parameters=(ParameterEntry(name="weight", shape=(num_parameters,), offset=0),),
        initial_parameters=file_entry("parameters.bin", files["parameters.bin"]),
        batch=BatchSpec(
            inputs=Structure(kind="array", leaves=(x,)), targets=Structure(kind="array", leaves=(y,)), weights=w
        ),
        loss="cross_entropy",
        metrics=(),
        programs=(Program(runtime="onnxruntime", minimum_version="1", graphs={"step": graph}),),
        self_test=SelfTest(
            file=file_entry("self_test.bin", files["self_test.bin"]),
            loss_sum=0.0,
            weight_sum=1.0,
            metrics={},
            gradients=(GradientCheck(name="weight", norm=0.0, projection=0.0),),
        ),
    )
    return write_bundle(out, manifest, files)

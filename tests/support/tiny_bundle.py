"""A real small bundle with a backward pass written by hand: an oracle that needs no torch and no exporter.

The model is a two-layer perceptron on the last axis, with cross-entropy:

    h = tanh(x W1' + b1),  z = h W2' + b2,  loss = logsumexp(z) - z[target]

`inputs` are float32 [B, D], or [B, T, D] with losses and weights per token [B, T]. `reference_step` is the
same in float64 numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

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
    probe_signs,
)

FEATURES, HIDDEN, CLASSES = 5, 7, 3
SHAPES = {
    "first.weight": (HIDDEN, FEATURES),
    "first.bias": (HIDDEN,),
    "second.weight": (CLASSES, HIDDEN),
    "second.bias": (CLASSES,),
}
NUM_PARAMETERS = sum(int(np.prod(shape)) for shape in SHAPES.values())
_ONNX = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def initial_parameters(seed: int = 0) -> np.ndarray:
    """Float32 [NUM_PARAMETERS]."""
    return np.random.default_rng(seed).normal(0, 0.5, NUM_PARAMETERS).astype(np.float32)


def split(vector: np.ndarray) -> list[np.ndarray]:
    """The four tensors of a flat vector."""
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    parts = np.split(vector, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES.values(), strict=True)]


@dataclass(frozen=True)
class Reference:
    loss_sum: float
    weight_sum: float
    correct: float
    gradients: np.ndarray
    logits: np.ndarray


def reference_step(parameters, x, y, weights) -> Reference:
    """Loss and gradients in float64. x [..., D], y [...], weights [...]."""
    w1, b1, w2, b2 = (part.astype(np.float64) for part in split(parameters))
    x, y, weights = x.reshape(-1, FEATURES).astype(np.float64), y.reshape(-1), weights.reshape(-1)
    hidden = np.tanh(x @ w1.T + b1)
    logits = hidden @ w2.T + b2
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    rows = np.arange(len(y))
    losses = log_sum - shifted[rows, y]
    d_logits = np.exp(shifted - log_sum[:, None])
    d_logits[rows, y] -= 1
    d_logits *= weights[:, None]
    d_hidden = (d_logits @ w2) * (1 - hidden**2)
    gradients = [d_hidden.T @ x, d_hidden.sum(0), d_logits.T @ hidden, d_logits.sum(0)]
    return Reference(
        loss_sum=float((losses * weights).sum()),
        weight_sum=float(weights.sum()),
        correct=float(((logits.argmax(axis=1) == y) * weights).sum()),
        gradients=np.concatenate([gradient.ravel() for gradient in gradients]),
        logits=logits,
    )


def make_data(count: int, *, tokens: int | None = None, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Learnable data: the class is the largest of the first CLASSES features. x float32, y int64."""
    shape = (count,) if tokens is None else (count, tokens)
    x = np.random.default_rng(seed).normal(size=(*shape, FEATURES)).astype(np.float32)
    return x, x[..., :CLASSES].argmax(axis=-1).astype(np.int64)


def write_tiny_bundle(
    out: Path,
    *,
    micro_batch: int = 4,
    tokens: int | None = None,
    kind: Literal["array", "tuple", "dict"] = "array",
    unused_input: bool = False,
    graphs: tuple[str, ...] = ("step", "eval", "infer"),
    runtimes: tuple[str, ...] = ("onnxruntime", "ort-training"),
    minimum_version: str = "1.19",
    padding: int = 0,
) -> Path:
    """Writes the bundle.

    Args:
        out: directory, or archive ending in `.edge`.
        micro_batch: B.
        tokens: T, for losses per token; None for one loss per sample.
        kind: structure of the inputs; a tuple or dict has the leaf `x` first.
        unused_input: adds a second leaf, int64 [B], that the graphs do not read.
        graphs: which graphs to write.
        runtimes: which programs to write; any name is taken, for plain ONNX.
        minimum_version: of every runtime, in the manifest.
        padding: bytes that make the step's graph larger, and mean nothing.
    """
    lead = (micro_batch,) if tokens is None else (micro_batch, tokens)
    keys = {"array": ["inputs"], "tuple": ["inputs.0", "inputs.1"], "dict": ["inputs.x", "inputs.id"]}[kind]
    x_spec = TensorSpec(name=keys[0], dtype="float32", shape=(*lead, FEATURES))
    leaves = [x_spec]
    if unused_input:
        leaves.append(TensorSpec(name=keys[1], dtype="int64", shape=(micro_batch,)))
    y_spec = TensorSpec(name="targets", dtype="int64", shape=lead)
    w_spec = TensorSpec(name="weights", dtype="float32", shape=lead)

    parameters = initial_parameters()
    x, y = make_data(micro_batch, tokens=tokens, seed=2)
    weights = np.linspace(0.5, 1.5, int(np.prod(lead)), dtype=np.float32).reshape(lead)
    arrays = [x] + ([np.arange(micro_batch)] if unused_input else []) + [y, weights]
    expected = reference_step(parameters, x, y, weights)

    files = {
        "parameters.bin": parameters.tobytes(),
        "self_test.bin": b"".join(array.tobytes() for array in arrays),
    }
    programs = []
    for runtime in runtimes:
        entries = {}
        for graph in graphs:
            model, inputs, outputs = _build(graph, x_spec, y_spec, w_spec)
            if runtime == "ort-training" and graph == "step":
                _accumulate(model)
            if padding and graph == "step":
                filler = np.random.default_rng(0).bytes(padding // 2).hex()
                helper.set_model_props(model, {"padding": filler})
            name = f"{runtime}/{graph}.onnx"
            files[name] = model.SerializeToString()
            entries[graph] = Graph(file=file_entry(name, files[name]), inputs=inputs, outputs=outputs)
        programs.append(Program(runtime=runtime, minimum_version=minimum_version, graphs=entries))
    table, offset = [], 0
    for name, shape in SHAPES.items():
        table.append(ParameterEntry(name=name, shape=shape, offset=offset))
        offset += table[-1].numel
    checks = tuple(
        GradientCheck(
            name=entry.name,
            norm=float(np.linalg.norm(part)),
            projection=float(part @ probe_signs(entry.numel)),
        )
        for entry, part in ((entry, expected.gradients[entry.offset : entry.offset + entry.numel]) for entry in table)
    )
    manifest = Manifest(
        name="tiny",
        producer="tests",
        micro_batch=micro_batch,
        parameters=tuple(table),
        initial_parameters=file_entry("parameters.bin", files["parameters.bin"]),
        batch=BatchSpec(
            inputs=Structure(kind=kind, leaves=tuple(leaves)),
            targets=Structure(kind="array", leaves=(y_spec,)),
            weights=w_spec,
        ),
        loss="cross_entropy",
        metrics=("accuracy",),
        programs=tuple(programs),
        self_test=SelfTest(
            file=file_entry("self_test.bin", files["self_test.bin"]),
            loss_sum=expected.loss_sum,
            weight_sum=expected.weight_sum,
            metrics={"accuracy": expected.correct},
            gradients=checks,
        ),
    )
    return write_bundle(out, manifest, files)


def _build(
    graph: str, x_spec: TensorSpec, y_spec: TensorSpec, w_spec: TensorSpec
) -> tuple[onnx.ModelProto, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The ONNX model of one graph, with its inputs and outputs."""
    parameter_specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in SHAPES.items()]
    n = int(np.prod(w_spec.shape))
    node = helper.make_node
    constants = {
        "flat_x": np.array([n, FEATURES]),
        "flat": np.array([n]),
        "logits_shape": np.array([*w_spec.shape, CLASSES]),
        "axis0": np.array([0]),
        "axis1": np.array([1]),
        "classes": np.array(CLASSES),
        "off_on": np.array([0, 1], np.float32),
        "one": np.array(1, np.float32),
    }
    nodes = [
        node("Reshape", [x_spec.name, "flat_x"], ["x"]),
        node("Gemm", ["x", "first.weight", "first.bias"], ["pre"], transB=1),
        node("Tanh", ["pre"], ["hidden"]),
        node("Gemm", ["hidden", "second.weight", "second.bias"], ["z"], transB=1),
    ]
    scalar = [TensorSpec(name=name, dtype="float32", shape=()) for name in ("loss_sum", "weight_sum", "accuracy")]
    if graph == "infer":
        nodes.append(node("Reshape", ["z", "logits_shape"], ["logits"]))
        inputs = [*parameter_specs, x_spec]
        outputs = [TensorSpec(name="logits", dtype="float32", shape=(*w_spec.shape, CLASSES))]
    else:
        inputs, outputs = [*parameter_specs, x_spec, y_spec, w_spec], scalar
        nodes += [
            node("Reshape", [y_spec.name, "flat"], ["y"]),
            node("Reshape", [w_spec.name, "flat"], ["w"]),
            node("LogSoftmax", ["z"], ["log_p"], axis=1),
            node("OneHot", ["y", "classes", "off_on"], ["hot"], axis=1),
            node("Unsqueeze", ["w", "axis1"], ["w1"]),
            node("Mul", ["hot", "w1"], ["hot_w"]),
            node("Mul", ["log_p", "hot_w"], ["picked"]),
            node("ReduceSum", ["picked"], ["negative"], keepdims=0),
            node("Neg", ["negative"], ["loss_sum"]),
            node("ReduceSum", ["w"], ["weight_sum"], keepdims=0),
            node("ArgMax", ["z"], ["guess"], axis=1, keepdims=0),
            node("Equal", ["guess", "y"], ["hit"]),
            node("Cast", ["hit"], ["hit_f"], to=TensorProto.FLOAT),
            node("Mul", ["hit_f", "w"], ["hit_w"]),
            node("ReduceSum", ["hit_w"], ["accuracy"], keepdims=0),
        ]
    if graph == "step":
        outputs = scalar + [
            TensorSpec(name=f"grad:{spec.name}", dtype="float32", shape=spec.shape) for spec in parameter_specs
        ]
        nodes += [
            node("Exp", ["log_p"], ["p"]),
            node("Mul", ["p", "w1"], ["p_w"]),
            node("Sub", ["p_w", "hot_w"], ["dz"]),
            node("Gemm", ["dz", "hidden"], ["grad:second.weight"], transA=1),
            node("ReduceSum", ["dz", "axis0"], ["grad:second.bias"], keepdims=0),
            node("MatMul", ["dz", "second.weight"], ["dh"]),
            node("Mul", ["hidden", "hidden"], ["h2"]),
            node("Sub", ["one", "h2"], ["slope"]),
            node("Mul", ["dh", "slope"], ["dpre"]),
            node("Gemm", ["dpre", "x"], ["grad:first.weight"], transA=1),
            node("ReduceSum", ["dpre", "axis0"], ["grad:first.bias"], keepdims=0),
        ]
    built = helper.make_graph(
        nodes,
        graph,
        [helper.make_tensor_value_info(spec.name, _ONNX[spec.dtype], spec.shape) for spec in inputs],
        [helper.make_tensor_value_info(spec.name, _ONNX[spec.dtype], spec.shape) for spec in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model, tuple(inputs), tuple(outputs)


def _accumulate(model: onnx.ModelProto) -> None:
    """Gradients into buffers that are inputs, as onnxruntime-training's `generate_artifacts` has them."""
    graph = model.graph
    info = helper.make_tensor_value_info
    gradients = [value for value in graph.output if value.name.startswith("grad:")]
    own = [value for value in graph.output if not value.name.startswith("grad:")]
    del graph.output[:]
    graph.output.extend(own)
    for gradient in gradients:
        name = gradient.name.removeprefix("grad:")
        buffer, done = f"{name}_grad.accumulation.buffer", f"{name}_grad.accumulation.out"
        graph.input.append(info(buffer, TensorProto.FLOAT, SHAPES[name]))
        graph.output.append(info(done, TensorProto.BOOL, [1]))
        inputs = [buffer, gradient.name, "lazy_reset_grad"]
        graph.node.append(helper.make_node("InPlaceAccumulatorV2", inputs, [done], domain="com.microsoft"))
    graph.input.append(info("lazy_reset_grad", TensorProto.BOOL, [1]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

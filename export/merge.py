"""From trained parameters back to an ordinary inference model, without adapters and without edgetrain."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import safetensors
import safetensors.numpy
import torch
from torch import nn

from edgetrain.export.batch import Example, HalfBatch, call_module, flatten_outputs, replaced
from edgetrain.export.errors import MergeError
from edgetrain.export.lowering.base import Array, LoweredGraph
from edgetrain.export.lowering.onnx import OnnxLowering
from edgetrain.export.parity import wrong_output
from edgetrain.export.prepare import Prepared, plain_math, prepare
from edgetrain.export.quiet import quiet
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.files import write_atomically
from edgetrain.protocol.int8 import graph_inputs, representable
from edgetrain.protocol.manifest import Manifest, Structure
from edgetrain.protocol.vectors import Vector, from_named


def merge(
    bundle: str | os.PathLike[str] | Bundle,
    parameters: str | os.PathLike[str] | npt.ArrayLike,
    out: str | os.PathLike[str],
    *,
    module: nn.Module | None = None,
) -> Path:
    """Writes an ordinary inference model with the trained parameters in it and no adapters left.

    Args:
        bundle: with a program for onnxruntime.
        parameters: the flat vector, or a file of it: `.safetensors` by name, `.npy`, or raw float32.
        out: `.onnx` for a model that takes the inputs and nothing else, or `.pt` for the `state_dict` of
            `module`.
        module: for `.pt`, the module that was exported, with the same frozen weights.

    Returns:
        `out`.

    Raises:
        MergeError: the parameters are not the bundle's, the module is not the one that was exported, or the
            format of `out` is unknown. Nothing is written.
        BundleError: the bundle is missing or corrupt.
    """
    out = Path(out)
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    entries = opened.manifest.parameters
    # What a device computes with, where it keeps weights in int8.
    vector = representable(read_parameters(parameters, opened.manifest), entries)
    inputs = _example_inputs(opened)
    infer = opened.read(opened.manifest.program("onnxruntime").graphs["infer"].file)
    expected = _run_infer(opened.manifest, infer, vector, inputs)
    if out.suffix == ".onnx":
        data = _merged_onnx(opened.manifest, infer, vector)
        _compare(expected, _run_onnx(data, inputs), f"the merged {out.name}")
    elif out.suffix == ".pt":
        if module is None:
            raise MergeError(
                f"{out}: a state_dict needs the module that was exported: give it (--model SOURCE), or write .onnx"
            )
        data = _state_dict(opened.manifest, vector, module, inputs, expected)
    else:
        raise MergeError(f"{out}: write a .onnx or a .pt file, not {out.suffix or 'a name without ending'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
    except OSError as error:
        raise MergeError(f"{out}: cannot be written: {error}") from error
    return out


def read_parameters(parameters: str | os.PathLike[str] | npt.ArrayLike, manifest: Manifest) -> Vector:
    """The flat vector of a bundle, from an array or a file.

    Raises:
        MergeError: missing, unreadable, of another length, other names or shapes, or not finite.
    """
    if isinstance(parameters, str | os.PathLike):
        vector = _read_file(Path(parameters), manifest)
    else:
        vector = np.asarray(parameters, dtype=np.float32)
    if vector.shape != (manifest.num_parameters,):
        raise MergeError(
            f"the parameters have shape {list(vector.shape)}, bundle {manifest.name!r} has {manifest.num_parameters}"
        )
    if not np.isfinite(vector).all():
        raise MergeError("the parameters hold values that are NaN or infinite")
    return vector


def _read_file(path: Path, manifest: Manifest) -> Vector:
    try:
        if path.suffix == ".safetensors":
            return from_named(safetensors.numpy.load(path.read_bytes()), manifest.parameters)
        if path.suffix == ".npy":
            loaded: Vector = np.load(path, allow_pickle=False).astype(np.float32)
            return loaded
        return np.frombuffer(path.read_bytes(), dtype="<f4").astype(np.float32)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise MergeError(f"{path}: cannot be read as parameters: {error}") from error


def _example_inputs(bundle: Bundle) -> dict[str, Array]:
    data = bundle.read(bundle.manifest.self_test.file)
    inputs, offset = {}, 0
    for spec in bundle.manifest.batch.inputs.leaves:
        inputs[spec.name] = np.frombuffer(data, spec.dtype, spec.numel, offset).reshape(spec.shape)
        offset += spec.nbytes
    return inputs


def _run_infer(manifest: Manifest, infer: bytes, vector: Vector, inputs: dict[str, Array]) -> dict[str, Array]:
    graph = manifest.program("onnxruntime").graphs["infer"]
    arrays = graph_inputs(vector, manifest.parameters)
    arrays += [inputs[spec.name] for spec in graph.inputs[len(arrays) :]]
    outputs = OnnxLowering().load(LoweredGraph(file="infer.onnx", data=infer))(arrays)
    return {spec.name: output for spec, output in zip(graph.outputs, outputs, strict=True)}


def _run_onnx(data: bytes, inputs: dict[str, Array]) -> dict[str, Array]:
    model = onnx.load_from_string(data)
    run = OnnxLowering().load(LoweredGraph(file="merged.onnx", data=data))
    outputs = run([inputs[value.name] for value in model.graph.input])
    return {value.name: output for value, output in zip(model.graph.output, outputs, strict=True)}


def _merged_onnx(manifest: Manifest, infer: bytes, vector: Vector) -> bytes:
    model = onnx.load_from_string(infer)
    graph = model.graph
    for array, value in zip(graph_inputs(vector, manifest.parameters), list(graph.input), strict=False):
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), value.name))
        graph.input.remove(value)
    from onnxscript import optimizer  # noqa: PLC0415  # slow to import, and needed only here

    with quiet():
        # The products of adapters are larger than what is folded by default.
        merged = optimizer.optimize(model, input_size_limit=2**31, output_size_limit=2**31)
    data: bytes = merged.SerializeToString(deterministic=True)
    return data


def _state_dict(
    manifest: Manifest,
    vector: Vector,
    module: nn.Module,
    inputs: dict[str, Array],
    expected: dict[str, Array],
) -> bytes:
    prepared = prepare(module, manifest.trainable)
    have = [(name, tuple(tensor.shape)) for name, tensor in prepared.trainable.items()]
    want = [(entry.name, entry.shape) for entry in manifest.parameters]
    if have != want:
        raise MergeError(
            f"the module is not the one that was exported: {manifest.trainable!r} selects "
            f"{len(have)} parameters of it, the bundle has {len(want)}: "
            f"{_first_difference(have, want)}"
        )
    merged = prepared.adapters.merged(
        {entry.name: torch.from_numpy(entry.of(vector).copy()) for entry in manifest.parameters}
    )
    outputs = _run_eager(prepared, merged, manifest.batch.inputs, inputs)
    _compare(expected, outputs, "the given module (are its frozen weights those that were exported?)")
    with replaced(prepared.base, merged):
        state = {name: tensor.detach().clone() for name, tensor in prepared.base.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _first_difference(have: list[tuple[str, tuple[int, ...]]], want: list[tuple[str, tuple[int, ...]]]) -> str:
    for ours, theirs in zip(have, want, strict=False):
        if ours != theirs:
            return f"{ours[0]} {list(ours[1])} instead of {theirs[0]} {list(theirs[1])}"
    return "one has more than the other"


def _run_eager(
    prepared: Prepared, merged: dict[str, torch.Tensor], structure: Structure, inputs: dict[str, Array]
) -> dict[str, Array]:
    tensors = tuple(torch.from_numpy(array.copy()) for array in inputs.values())
    keys = tuple(spec.name.removeprefix("inputs").removeprefix(".") for spec in structure.leaves)
    half = HalfBatch("inputs", structure.kind, keys, tensors)
    example = Example(half, HalfBatch("targets", "tuple", (), ()), len(tensors[0]))
    with plain_math(prepared.base), torch.no_grad():
        outputs = flatten_outputs(call_module(prepared.base, merged, example, tensors))
    return {name: value.numpy() for name, value in outputs.items()}


def _compare(expected: dict[str, Array], got: dict[str, Array], what: str) -> None:
    for name, value in expected.items():
        if name not in got:
            raise MergeError(f"{what} has no output {name!r}. Nothing was written")
        if wrong := wrong_output(got[name], value):
            difference, largest = wrong
            raise MergeError(
                f"{what} gives another output {name!r} than the bundle (difference {difference:.1e}, largest "
                f"element {largest:.1e}). Nothing was written"
            )

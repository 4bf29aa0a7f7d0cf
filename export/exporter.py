"""From a module to a bundle: prepare, trace, lower, prove, write."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import edgetrain
from edgetrain.export import locate, parity
from edgetrain.export.batch import Example, ExampleBatch, Loss, per_sample_loss, read_example
from edgetrain.export.errors import BatchError, SelectionError, UnsupportedError
from edgetrain.export.graph.joint import Problem
from edgetrain.export.lowering import get_lowering
from edgetrain.export.lowering.base import Lowering
from edgetrain.export.lowering.executorch import ExecutorchLowering
from edgetrain.export.lowering.onnx.int8_parameters import Int8Lowering
from edgetrain.export.metrics import Metric, check_metrics, default_metrics
from edgetrain.export.prepare import Prepared, plain_math, prepare
from edgetrain.export.program import make_program
from edgetrain.export.storage.calibration import calibration_data
from edgetrain.export.storage.settings import Storage
from edgetrain.export.storage.stored_program import make_stored_program
from edgetrain.export.storage.trainable_weights import in_int8
from edgetrain.export.user_code import user_code
from edgetrain.protocol.bundle import check_target, file_entry, write_bundle
from edgetrain.protocol.int8 import encode_parameters
from edgetrain.protocol.manifest import (
    FrozenSummary,
    GradientCheck,
    Manifest,
    ParameterEntry,
    SelfTest,
    TrainableStorage,
    probe_signs,
)
from edgetrain.protocol.vectors import Vector

logger = logging.getLogger(__name__)

FLOAT32 = Storage()
SELF_TEST_FILE = "self_test.bin"


def export_bundle(
    module: nn.Module,
    loss: Loss,
    example_batch: ExampleBatch,
    *,
    trainable: str = "all",
    runtimes: Sequence[str] = ("onnxruntime",),
    micro_batch: int | None = None,
    out: str | os.PathLike[str],
    name: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    ignore_index: int | None = None,
    per_sample_clipping: bool = False,
    split: bool = True,
    storage: Storage = FLOAT32,
    executorch_style: str = "functional",
) -> Path:
    """Exports a module with its training step, proves the gradients, and writes a bundle.

    Args:
        module: called as `module(inputs)`, `module(*inputs)` or `module(**inputs)`, as the example's inputs
            are a tensor, a tuple or a dict. Not changed.
        loss: `loss(outputs, targets)` -> one loss per sample, [B], or per token, [B, T].
        example_batch: `(inputs, targets)`, each a tensor, a tuple or a dict of tensors; dimension 0 is the
            batch.
        trainable: what learns; see `edgetrain.export.selection.select`.
        runtimes: one program is written for each.
        micro_batch: samples per call of the step; None for the size of the example.
        out: the bundle's directory, or an archive if it ends in `.edge`.
        name: for people; the class name if left out.
        metrics: `metric(outputs, targets)` -> values per loss, by name; None for the defaults.
        ignore_index: targets with this value weigh nothing, as in `torch.nn.CrossEntropyLoss`, which is asked
            for its own if this is None. Needs integer targets in the shape of the losses.
        per_sample_clipping: adds the graph `step_per_sample_clipped`, for differential privacy.
        split: adds `trunk` and `head_step` where a frozen part is worth it, so that its outputs can be kept.
        storage: how frozen weights are stored, which but for float32 is for one runtime alone, and how trainable
            ones are kept: int8 is for onnxruntime alone.
        executorch_style: "functional"; "training-module" adds a program for ExecuTorch's own TrainingModule.

    Returns:
        `out`.

    Raises:
        BatchError: the example batch, the loss or a metric does not fit.
        SelectionError: the selection matches nothing.
        UnsupportedError: something has no export, or a runtime is unknown or not installed.
        ToleranceError: the storage changes the loss too much. Nothing is written.
        ParityError: the exported numbers are not eager torch's. Nothing is written.
        BundleError: `out` cannot be written.
    """
    check_target(out)
    lowerings = _lowerings(runtimes, executorch_style)
    storage.check(lowerings)
    if storage.kind != "float32" and executorch_style != "functional":
        raise UnsupportedError(
            f"ExecuTorch's TrainingModule runs the whole step, a bundle with {storage.kind} has only its parts: leave "
            "out one of them"
        )
    if per_sample_clipping:
        storage.check_clipping()
    example = read_example(example_batch, micro_batch)
    prepared = prepare(module, trainable)
    storage.check_frozen(prepared.frozen)
    problem = make_problem(prepared, loss, example, metrics, ignore_index)
    locate.refuse_randomness(problem)
    calibration = calibration_data(problem, storage)
    report: TrainableStorage | None = None
    if storage.trainable == "int8":
        problem, report = in_int8(problem, storage, calibration.batches)
        lowerings = [Int8Lowering(problem.int8)]  # checked above: onnxruntime alone
    problem, expected = parity.expectations(problem, clipping=per_sample_clipping)
    parity.check_finite(problem, expected.initial)
    notes = (*prepared.notes, *calibration.notes, *_unused(prepared, expected.initial))
    files: dict[str, bytes] = {}
    found = expected.initial
    quantized: dict[str, str] = {}
    if storage.kind == "float32":
        programs = tuple(make_program(lowering, problem, expected, files, split=split) for lowering in lowerings)
    else:
        stored = make_stored_program(lowerings[0], problem, expected, files, storage, calibration.batches)
        programs, found, notes = (stored.program,), stored.expected, (*notes, *stored.notes)
        quantized = stored.quantized
    table = _table(problem)
    parameters_file = "parameters.i8" if problem.int8 else "parameters.f32"
    files[parameters_file] = encode_parameters(_flat(problem.parameters), table)
    files[SELF_TEST_FILE] = _raw((*example.leaves, problem.weights))
    manifest = Manifest(
        name=name or type(module).__name__,
        producer=f"edgetrain {edgetrain.__version__}",
        micro_batch=example.micro_batch,
        parameters=table,
        initial_parameters=file_entry(parameters_file, files[parameters_file]),
        batch=example.spec(problem.weights),
        loss=_qualified_name(loss),
        metrics=tuple(problem.metrics),
        trainable=trainable,
        frozen=_frozen_summary(prepared, quantized),
        trainable_storage=report,
        notes=notes,
        programs=programs,
        self_test=_self_test(problem, found, files[SELF_TEST_FILE], storage),
    )
    for note in notes:
        logger.info(note)
    return write_bundle(out, manifest, files)


def _lowerings(runtimes: Sequence[str], executorch_style: str) -> list[Lowering]:
    if isinstance(runtimes, str) or not runtimes:
        raise UnsupportedError("runtimes must be a list of at least one name, e.g. ('onnxruntime',)")
    found = [get_lowering(runtime) for runtime in dict.fromkeys(runtimes)]
    if executorch_style != "functional":
        if "executorch" not in runtimes:
            raise UnsupportedError(f"the executorch style {executorch_style!r} needs the runtime executorch")
        found = [ExecutorchLowering(executorch_style) if one.runtime == "executorch" else one for one in found]
    for lowering in found:
        if reason := lowering.available():
            raise UnsupportedError(f"runtime {lowering.runtime!r}: {reason}")
    return found


def _unused(prepared: Prepared, expected: parity.Reference) -> list[str]:
    """Notes on parameters that the loss does not depend on.

    Raises:
        SelectionError: an adapter is among them, or there is no other.
    """
    unused = expected.unused
    added = {name for names in prepared.adapters.names.values() for name in names}
    if wrong := [name for name in unused if name in added]:
        raise SelectionError(
            f"{wrong[0]} has no influence on the loss: the model uses that layer's weight without calling "
            "the layer, or not at all. Leave it out of the target"
        )
    if len(unused) == len(prepared.trainable):
        raise SelectionError(
            f"the loss depends on none of the selected parameters ({', '.join(unused[:5])}…): there is "
            "nothing to train. Select others, or check that the loss uses the outputs"
        )
    return [f"{name} has no influence on the loss: its gradient is zero" for name in unused]


def make_problem(
    prepared: Prepared,
    loss: Loss,
    example: Example,
    metrics: Mapping[str, Metric] | None = None,
    ignore_index: int | None = None,
) -> Problem:
    """Runs the module once to learn the shape of the weights and which metrics fit.

    Args:
        prepared: the module.
        loss: see `export_bundle`.
        example: the example batch.
        metrics: see `export_bundle`.
        ignore_index: see `export_bundle`.

    Raises:
        BatchError: the example batch, the loss or a metric does not fit.
        SourceError: the user's code raised.
    """
    probe = Problem(prepared, loss, {}, example, torch.ones(()))
    inputs, targets = probe.split(example.leaves)
    with plain_math(prepared.module), torch.no_grad():
        with user_code("calling the module with the example inputs"):
            outputs = probe.outputs(probe.parameters, inputs)
        with user_code("calling the loss with the module's outputs and the example targets"):
            losses = per_sample_loss(loss(outputs, targets), example.micro_batch)
        shape = tuple(losses.shape)
        chosen = default_metrics(outputs, targets, shape) if metrics is None else dict(metrics)
        with user_code("calling a metric"):
            check_metrics(chosen, outputs, targets, shape)
    ignored = _ignored(loss, targets, shape, ignore_index)
    return Problem(prepared, loss, chosen, example, _example_weights(shape), ignored)


def _ignored(loss: Loss, targets: object, shape: tuple[int, ...], asked: int | None) -> int | None:
    """The target value that weighs nothing, where targets line up with the losses."""
    fits = isinstance(targets, Tensor) and not targets.is_floating_point() and tuple(targets.shape) == shape
    if asked is not None and not fits:
        raise BatchError(f"ignore_index={asked} needs one tensor of integer targets in the losses' shape {list(shape)}")
    found = getattr(loss, "ignore_index", None) if asked is None else asked
    return found if fits and isinstance(found, int) else None


def _example_weights(shape: tuple[int, ...]) -> Tensor:
    """Weights between 0.25 and 1 that differ from sample to sample and token to token."""
    count = int(np.prod(shape))
    return (1.0 - 0.75 * (torch.arange(count) % 7) / 7).reshape(shape)


def _raw(tensors: Sequence[Tensor]) -> bytes:
    return b"".join(np.ascontiguousarray(tensor.numpy()).tobytes() for tensor in tensors)


def _flat(tensors: Sequence[Tensor]) -> Vector:
    return np.concatenate([np.empty(0, np.float32), *(tensor.numpy().ravel() for tensor in tensors)])


def _table(problem: Problem) -> tuple[ParameterEntry, ...]:
    entries = []
    offset = 0
    for name, tensor in problem.prepared.trainable.items():
        dtype: Literal["float32", "int8"] = "int8" if name in problem.int8 else "float32"
        entries.append(ParameterEntry(name=name, shape=tuple(tensor.shape), offset=offset, dtype=dtype))
        offset += tensor.numel()
    return tuple(entries)


def _frozen_summary(prepared: Prepared, quantized: dict[str, str]) -> FrozenSummary:
    tensors = prepared.frozen.values()
    return FrozenSummary(
        sparse=prepared.adapters.sparse,
        elements=sum(tensor.numel() for tensor in tensors),
        quantized=quantized,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def _self_test(problem: Problem, expected: parity.Reference, data: bytes, storage: Storage) -> SelfTest:
    checks = []
    for name, gradient in expected.gradients.items():
        flat = gradient.astype(np.float64).ravel()
        checks.append(
            GradientCheck(
                name=name,
                norm=float(np.linalg.norm(flat)),
                projection=float(flat @ probe_signs(flat.size).astype(np.float64)),
            )
        )
    return SelfTest(
        file=file_entry(SELF_TEST_FILE, data),
        loss_sum=expected.loss_sum,
        weight_sum=expected.weight_sum,
        metrics={name: float(np.sum(expected.metrics[name])) for name in problem.metrics},
        gradients=tuple(checks),
        tolerance=storage.tolerance,
    )


def _qualified_name(loss: Loss) -> str:
    return getattr(loss, "__qualname__", None) or type(loss).__qualname__

"""Trainable weights in int8: rounded before anything is traced.

Programs take them as whole numbers and scales (`edgetrain.export.lowering.onnx.int8_parameters`). What eager torch
computes at weights that int8 can hold is what such a program must give, so the ordinary proof covers it: its points are
rounded. How the weights learn is the device's affair (`edgetrain.edge_client.runtimes.int8_parameters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from edgetrain.export.errors import UnsupportedError
from edgetrain.export.graph.joint import Problem
from edgetrain.export.prepare import plain_math
from edgetrain.export.storage.calibration import Batch
from edgetrain.export.storage.frozen_weights import is_weight
from edgetrain.export.storage.settings import Storage
from edgetrain.protocol.manifest import TrainableStorage


def in_int8(problem: Problem, storage: Storage, calibration: Sequence[Batch]) -> tuple[Problem, TrainableStorage]:
    """The problem with its large weights rounded and named as kept in int8, and what that brings and costs.

    Raises:
        UnsupportedError: none of them is large enough to be worth it.
        ToleranceError: rounding changes the loss on the calibration data by more than is allowed.
    """
    trainable = problem.prepared.trainable
    names = frozenset(name for name, tensor in trainable.items() if is_weight(tensor))
    if not names:
        raise UnsupportedError(
            "nothing that learns is worth int8: that takes matrices and kernels of 256 elements or more. Leave out "
            "--trainable-storage, or let more learn"
        )
    named = replace(problem, int8=names)
    values = dict(zip(trainable, named.representable(problem.parameters), strict=True))
    rounded = replace(named, prepared=replace(problem.prepared, trainable=values))
    before, after = _mean_loss(problem, calibration), _mean_loss(rounded, calibration)
    storage.check_loss("trainable weights as int8", before, after, "Keep them in float32, or allow more")
    sizes = {name: (tensor.numel(), tensor.shape[0]) for name, tensor in trainable.items()}
    return rounded, TrainableStorage(
        kind="int8",
        bytes_before=sum(4 * count for count, _ in sizes.values()),
        bytes_after=sum(count + 4 * rows if name in names else 4 * count for name, (count, rows) in sizes.items()),
        calibration_samples=len(calibration) * problem.example.micro_batch,
        loss_before=before,
        loss_after=after,
    )


def _mean_loss(problem: Problem, batches: Sequence[Batch]) -> float:
    """Of eager torch at the initial parameters."""
    losses = weights = 0.0
    with plain_math(problem.prepared.module), torch.no_grad():
        for batch in batches:
            found = problem.evaluate(problem.parameters, batch, torch.ones_like(problem.weights))
            losses += float((found.losses * found.weights).sum())
            weights += float(found.weights.sum())
    return losses / weights if weights else losses

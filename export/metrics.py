"""Metrics beside the loss. Each gives values per sample, of which the graph gives the weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edgetrain.export.batch import logits_of
from edgetrain.export.errors import BatchError

# Counts per class are left out beyond this many: they would cost more than they tell.
MAX_CLASSES = 100

Metric = Callable[[Any, Any], Tensor]
"""`metric(outputs, targets)` -> values [B] or [B, T] as the loss, or with one more dimension of classes."""


def correct(outputs: Any, targets: Any) -> Tensor:
    """1 where the class of the largest logit is the target. Logits [..., C], targets [...]."""
    right: Tensor = logits_of(outputs).argmax(-1) == targets
    return right.float()


def class_count(outputs: Any, targets: Any) -> Tensor:
    """One row per sample with a 1 at its class: summed, the samples of each class [C]."""
    rows: Tensor = targets.unsqueeze(-1) == torch.arange(logits_of(outputs).shape[-1])
    return rows.float()


def class_correct(outputs: Any, targets: Any) -> Tensor:
    """The same for samples that are classified correctly; divide by `class_count` for accuracy per class."""
    return class_count(outputs, targets) * correct(outputs, targets).unsqueeze(-1)


def default_metrics(outputs: Any, targets: Any, weights_shape: tuple[int, ...]) -> dict[str, Metric]:
    """Metrics for logits whose targets are the classes of the same samples or tokens; none otherwise.

    `correct`, and for at most `MAX_CLASSES` classes and one class per sample, `class_correct` and
    `class_count`.
    """
    logits = logits_of(outputs)
    fits = (
        isinstance(logits, Tensor)
        and isinstance(targets, Tensor)
        and logits.is_floating_point()
        and not targets.is_floating_point()
        and logits.ndim == targets.ndim + 1
        and tuple(logits.shape[:-1]) == tuple(targets.shape) == weights_shape
        and logits.shape[-1] > 1
    )
    if not fits:
        return {}
    if len(weights_shape) == 1 and logits.shape[-1] <= MAX_CLASSES:
        return {"correct": correct, "class_correct": class_correct, "class_count": class_count}
    return {"correct": correct}


def check_metrics(metrics: Mapping[str, Metric], outputs: Any, targets: Any, weights_shape: tuple[int, ...]) -> None:
    """Runs every metric once on the example.

    Raises:
        BatchError: a metric's values do not line up with the loss.
    """
    for name, metric in metrics.items():
        values = metric(outputs, targets)
        if not isinstance(values, Tensor) or tuple(values.shape[: len(weights_shape)]) != weights_shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise BatchError(
                f"metric {name!r} returned {got}; it must give one value (or one row) for each loss, "
                f"shape {list(weights_shape)}"
            )
        if values.ndim > len(weights_shape) + 1:
            raise BatchError(f"metric {name!r} returned {values.ndim} dimensions; one row per loss at most")


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over samples (and tokens): a scalar, or [C] for values with a row per sample."""
    values = values.to(weights.dtype)
    if values.ndim > weights.ndim:
        return (values * weights.unsqueeze(-1)).flatten(0, -2).sum(0)
    return (values * weights).sum()

"""Plain eager training: the independent yardstick for the reference models."""

from collections.abc import Callable
from typing import Any

import torch

from edgetrain.models import ModelSource
from edgetrain.models.data import IGNORE_INDEX, Samples, batches
from edgetrain.models.tensors import to_tensors


def call(module: torch.nn.Module, inputs: Any) -> Any:
    """The export's calling convention."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def train(
    source: ModelSource,
    samples: Samples[Any],
    *,
    steps: int,
    batch_size: int,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    seed: int = 0,
    max_grad_norm: float = 0.0,
) -> list[float]:
    """Trains in place and returns the mean loss of every step."""
    torch.set_num_threads(1)
    opt = optimizer(source.module.parameters())
    # To zero in a straight line: a level reached at the end of a decay varies little.
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=steps)
    source.module.train()
    history = []
    for batch in batches(samples, batch_size, epochs=steps, seed=seed):
        inputs, targets = to_tensors(batch)
        opt.zero_grad()
        counted = int((targets != IGNORE_INDEX).sum())
        loss = source.loss(call(source.module, inputs), targets).sum() / counted
        loss.backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(source.module.parameters(), max_grad_norm)
        opt.step()
        decay.step()
        history.append(loss.item())
        if len(history) == steps:
            return history
    return history


@torch.no_grad()
def accuracy(source: ModelSource, samples: Samples[Any]) -> float:
    """Share of right classes or, per token, of right tokens that count."""
    source.module.eval()
    right = counted = 0
    for batch in batches(samples, 128, epochs=1, seed=0):
        inputs, targets = to_tensors(batch)
        real = targets != IGNORE_INDEX
        right += int(((call(source.module, inputs).argmax(-1) == targets) & real).sum())
        counted += int(real.sum())
    return right / counted


@torch.no_grad()
def mean_loss(source: ModelSource, samples: Samples[Any], *, limit: int) -> float:
    """Mean loss per target that counts, over at most `limit` samples."""
    source.module.eval()
    inputs, targets = to_tensors(next(batches(samples, limit, epochs=1, seed=0)))
    return float(source.loss(call(source.module, inputs), targets).sum() / (targets != IGNORE_INDEX).sum())

"""Local training: one loop around `Session.step`, everything else pure functions on flat vectors.

Accumulation is exact: the weighted sums of the micro-batches are added and divided once by the sum of the
weights, so a batch of any size gives the gradient of one big batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import TrainingError
from edgetrain.edge_client.runtimes.base import EvalResult, Session, StepResult
from edgetrain.edge_client.runtimes.int8_parameters import Int8Parameters, any_in_int8
from edgetrain.edge_client.runtimes.staging import check_vector
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.local_parameters import local_parameters
from edgetrain.edge_client.training.optimizers import clipping_factor, norm_of, sgd
from edgetrain.edge_client.training.private_steps import PrivateSteps
from edgetrain.edge_client.training.schedules import learning_rate_factor
from edgetrain.protocol.privacy.randomness import RandomBytes
from edgetrain.protocol.training import TrainingConfig, count_steps
from edgetrain.protocol.vectors import Vector

Metrics = dict[str, npt.NDArray[np.float64]]
"""Weighted means by name: shape [] or a small vector."""


@dataclass(frozen=True, slots=True)
class StepProgress:
    """One optimizer step, as told to `on_step`."""

    # Steps done so far, this one included, and planned in all.
    step: int
    total_steps: int
    # Mean loss of this step's batch, before the step.
    loss: float
    learning_rate: float
    # Norm of the mean gradient, before clipping.
    gradient_norm: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a local training gives."""

    # [num_parameters], fresh memory.
    parameters: Vector
    # Samples in the data set: the weight of FedAvg.
    num_examples: int
    # Optimizer steps done.
    steps: int
    # Weighted means over all samples of the steps done; NaN if there were none.
    loss: float
    metrics: Metrics
    seconds: float
    # Why it ended early, or None.
    stopped: str | None = None


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """Weighted means over a data set."""

    num_examples: int
    loss: float
    metrics: Metrics


def train(
    session: Session,
    parameters: Vector,
    dataset: Dataset,
    config: TrainingConfig,
    *,
    seed: int,
    gradient_correction: Vector | None = None,
    random_bytes: RandomBytes | None = None,
    on_step: Callable[[StepProgress], None] | None = None,
    may_continue: Callable[[], bool | str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Trains on local data.

    Each optimizer step takes the mean gradient of its batch, clips it (`max_grad_norm`), adds the SCAFFOLD
    correction and the FedProx term, and hands it to SGD, which adds the weight decay. A batch whose weights
    are all 0 takes no step.

    Args:
        session: an open bundle.
        parameters: float32 [num_parameters], where to start; left as it is.
        dataset: samples in the bundle's structure.
        config: how to train.
        seed: of the shuffling, and of what is rounded at random; the same seed gives the same on every machine.
        gradient_correction: float32 [num_parameters], added to each step's mean gradient: c - c_i of
            SCAFFOLD (Karimireddy et al. 2020).
        random_bytes: where `config.privacy` takes batches and noise from; left out, from the operating system.
        on_step: called after every optimizer step.
        may_continue: asked before every micro-batch; False, or a reason, ends the training after the last
            whole step.
        clock: seconds, for `TrainingResult.seconds`.

    Raises:
        TrainingError: a loss or gradient is not finite.
        DataError: `parameters` or a batch does not fit the bundle.
    """
    started = clock()
    length = session.manifest.num_parameters
    check_vector(parameters, length)
    if gradient_correction is not None:
        check_vector(gradient_correction, length, "gradient_correction")
    optimizer = sgd(momentum=config.momentum, nesterov=config.nesterov, weight_decay=config.weight_decay)
    state = optimizer.init()
    local = local_parameters(session.manifest.parameters, parameters, seed)
    total_steps = count_steps(len(dataset), config)
    if dataset.augment is not None:
        dataset = dataset.augmented(np.random.Generator(np.random.PCG64([seed, 1])))
    sums, means = _Sums(with_gradient=True), _Sums()
    stopped: str | None = None
    step = 0
    private = PrivateSteps(session, config, config.privacy, random_bytes=random_bytes) if config.privacy else None
    for indices in private.batches(len(dataset)) if private else batches(len(dataset), config, seed):
        # Of a single micro-batch nothing is added up: its gradient is used where it is.
        sums.clear(length if len(indices) > session.manifest.micro_batch or private else 0)
        for start in range(0, len(indices), session.manifest.micro_batch):
            stopped = _stopped(may_continue)
            if stopped is not None:
                break
            chunk = indices[start : start + session.manifest.micro_batch]
            if private:
                result = private.step(local.vector(), dataset, chunk)
            else:
                result = session.step(local.given, *dataset.take(chunk))
            # What one sample makes of the loss is its own affair where it is protected.
            if not private and not math.isfinite(result.loss_sum):
                raise TrainingError(_astray("loss", step, config, means))
            sums.add(result)
        if stopped is not None:
            break
        if sums.weight_sum == 0 and not private:
            continue
        gradient, divisor = sums.gradient_sum(), sums.weight_sum
        if private:
            gradient, divisor = private.mean_gradient(gradient, len(dataset)), 1.0
        norm = norm_of(gradient) / divisor
        if not math.isfinite(norm):
            raise TrainingError(_astray("gradient", step, config, _Sums() if private else means))
        # The mean is made, and clipped, where it is used: a whole vector of its own costs time and memory.
        divisor /= clipping_factor(norm, config.max_grad_norm)
        if gradient_correction is not None or config.proximal_mu:
            gradient, divisor = gradient / np.float32(divisor), 1.0
        if gradient_correction is not None:
            gradient = gradient + gradient_correction
        if config.proximal_mu:
            gradient = gradient + np.float32(config.proximal_mu) * (local.vector() - parameters)
        rate = config.learning_rate * learning_rate_factor(config.schedule, step, total_steps)
        state = local.descend(optimizer, gradient, state, rate, divisor)
        means.add(sums)
        step += 1
        if on_step is not None:
            on_step(StepProgress(step, total_steps, sums.mean_loss(), rate, norm))
    return TrainingResult(
        parameters=local.trained(),
        num_examples=len(dataset),
        steps=step,
        loss=means.mean_loss(),
        metrics=means.mean_metrics(),
        seconds=clock() - started,
        stopped=stopped,
    )


def evaluate(session: Session, parameters: Vector, dataset: Dataset) -> EvalSummary:
    """Mean loss and metrics over a data set, in its order.

    Raises:
        DataError: `parameters` or a batch does not fit the bundle.
    """
    sums = _Sums()
    entries = session.manifest.parameters
    # Rounded once, not for every micro-batch.
    given = Int8Parameters(entries, parameters) if any_in_int8(entries) else parameters
    size = session.manifest.micro_batch
    for start in range(0, len(dataset), size):
        chunk = np.arange(start, min(start + size, len(dataset)))
        sums.add(session.evaluate(given, *dataset.take(chunk)))
    return EvalSummary(num_examples=len(dataset), loss=sums.mean_loss(), metrics=sums.mean_metrics())


def batches(num_examples: int, config: TrainingConfig, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """The sample indices of each optimizer step: a fresh permutation per epoch, the last batch ragged."""
    # Named in full: numpy promises the stream of PCG64, not that default_rng stays PCG64.
    rng = np.random.Generator(np.random.PCG64(seed))
    left = count_steps(num_examples, config)
    while left > 0:
        order = rng.permutation(num_examples)
        for start in range(0, num_examples, config.batch_size):
            if left > 0:
                yield order[start : start + config.batch_size]
            left -= 1


@dataclass(slots=True)
class _Sums:
    """Weighted sums, added up in float64 but for the gradient, which as float32 costs half the memory."""

    with_gradient: bool = False
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    # Added up, or that of the only result.
    gradient: Vector | None = None
    _own: Vector | None = None

    def clear(self, length: int) -> None:
        """For several results with gradients of this length, or for one result if that is 0."""
        self.loss_sum = self.weight_sum = 0.0
        self.metrics = {}
        self.gradient = None
        if length:
            if self._own is None:
                self._own = np.empty(length, np.float32)
            self._own.fill(0)
            self.gradient = self._own

    def add(self, result: StepResult | EvalResult | _Sums) -> None:
        self.loss_sum += result.loss_sum
        self.weight_sum += result.weight_sum
        for name, value in result.metrics.items():
            before = self.metrics.get(name)
            self.metrics[name] = value.astype(np.float64) if before is None else before + value
        if not self.with_gradient or not isinstance(result, StepResult):
            return
        if self.gradient is None:
            self.gradient = result.gradients
        else:
            self.gradient += result.gradients

    def gradient_sum(self) -> Vector:
        assert self.gradient is not None
        return self.gradient

    def mean_loss(self) -> float:
        return self.loss_sum / self.weight_sum if self.weight_sum else math.nan

    def mean_metrics(self) -> Metrics:
        return {name: value / self.weight_sum for name, value in self.metrics.items() if self.weight_sum}


def _stopped(may_continue: Callable[[], bool | str] | None) -> str | None:
    answer = True if may_continue is None else may_continue()
    if answer is True:
        return None
    return answer or "stopped"


def _astray(what: str, step: int, config: TrainingConfig, means: _Sums) -> str:
    so_far = f"; the mean loss until then was {means.mean_loss():.4g}" if means.weight_sum else ""
    return (
        f"the {what} of optimizer step {step + 1} is not finite (learning rate {config.learning_rate:g})"
        f"{so_far}. "
        "Lower learning_rate, or set max_grad_norm (1.0 is usual)."
    )

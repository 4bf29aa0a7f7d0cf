"""DP-SGD: what a local training does differently when every sample is to be protected.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1. Each optimizer step draws its samples
by Poisson sampling, sums their clipped gradients over as many micro-batches as it takes, adds noise once, and divides
by the number of samples that was *expected*. Batches and noise come from a cryptographically strong generator, not
from the plan's seed, which the coordinator knows.

The sum is rounded to a grid of 2^-30 clip norms before integer noise is added (see `protocol.privacy.noise`). Two
such sums for neighbouring data differ by at most the clip norm, up to what float32 arithmetic in the graph and this
rounding may add: for B samples at most about B^2 2^-24 + sqrt(d) 2^-30 clip norms. The noise is scaled up by
`MARGIN`, 2^-8, which covers batches of 256 samples in the worst case and any that are met in practice, whose errors
grow like sqrt(B).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgetrain.edge_client.errors import TrainingError
from edgetrain.edge_client.runtimes.base import Session, StepResult
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.protocol.manifest import STEP_CLIPPED
from edgetrain.protocol.privacy.errors import PrivacyError
from edgetrain.protocol.privacy.noise import chunks, rounded_gaussian
from edgetrain.protocol.privacy.randomness import Keystream, RandomBytes, bernoulli
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.training import SamplePrivacy, TrainingConfig, count_steps
from edgetrain.protocol.vectors import Vector

# Steps of the grid in a clip norm.
GRID = 2.0**30
# The sensitivity is taken to be so much larger than the clip norm.
MARGIN = 2.0**-8


def check_bundle(session: Session, config: TrainingConfig) -> None:
    """Returns if a training can be done with a session.

    Raises:
        PrivacyError: it is to be private, and the bundle was not exported for that.
    """
    if config.privacy and STEP_CLIPPED not in session.manifest.program(session.runtime).graphs:
        raise PrivacyError(
            f"[training.privacy] clips by sample, and bundle {session.manifest.name!r} was exported without that for "
            f"{session.runtime}: export it with --per-sample-clipping"
        )


def planned_release(num_examples: int, config: TrainingConfig) -> Release:
    """What a whole local training releases: one noisy sum per optimizer step.

    Args:
        num_examples: of the local data; taken to be public, as everybody does who samples at a rate.
        config: with `privacy`.
    """
    assert config.privacy is not None, "asked for"
    rate = sampling_rate(num_examples, config)
    return Release(
        mechanism="gaussian",
        noise_multiplier=config.privacy.noise_multiplier,
        sampling="none" if rate == 1 else "poisson",
        sampling_rate=rate,
        steps=count_steps(num_examples, config),
    )


def sampling_rate(num_examples: int, config: TrainingConfig) -> float:
    """Probability of each sample to be in an optimizer step."""
    return min(1.0, config.batch_size / num_examples)


class PrivateSteps:
    """The private part of one local training.

    Args:
        session: of a bundle with per-sample clipping.
        config: how to train.
        privacy: how to protect.
        random_bytes: for batches and noise.
    """

    def __init__(
        self,
        session: Session,
        config: TrainingConfig,
        privacy: SamplePrivacy,
        *,
        random_bytes: RandomBytes | None = None,
    ) -> None:
        self._session = session
        self._config = config
        self._privacy = privacy
        self._random = random_bytes or Keystream()
        self._noise = rounded_gaussian(privacy.noise_multiplier * (1 + MARGIN) * GRID)

    def batches(self, num_examples: int) -> Iterator[npt.NDArray[np.int64]]:
        """The sample indices of each optimizer step; some may be empty, and count all the same."""
        rate = sampling_rate(num_examples, self._config)
        for _ in range(count_steps(num_examples, self._config)):
            yield np.flatnonzero(bernoulli(self._random, rate, num_examples))

    def step(self, parameters: Vector, dataset: Dataset, indices: npt.NDArray[np.int64]) -> StepResult:
        """The clipped sums of one micro-batch.

        A sample whose gradient is not finite is left out, whatever it does to the others: it must not decide about
        them.

        Raises:
            TrainingError: the parameters themselves have gone astray.
        """
        batch, weights = dataset.take(indices)
        result = self._session.step_clipped(parameters, batch, weights, clip_norm=self._privacy.clip_norm)
        finite = np.isfinite(result.norms)
        if not finite.all():
            if not np.isfinite(parameters).all():
                raise TrainingError("the parameters are not finite: lower learning_rate")
            if not finite.any():
                return StepResult(0.0, 0.0, {}, np.zeros_like(result.gradients))
            return self.step(parameters, dataset, indices[finite])
        return StepResult(result.loss_sum, result.weight_sum, result.metrics, result.gradients)

    def mean_gradient(self, clipped_sum: Vector, num_examples: int) -> Vector:
        """The private mean of an optimizer step, float32 [num_parameters].

        Args:
            clipped_sum: of all samples of the step.
            num_examples: of the local data.
        """
        step = self._privacy.clip_norm / GRID
        expected = sampling_rate(num_examples, self._config) * num_examples
        mean = np.empty_like(clipped_sum)
        for part, noise in chunks(self._noise, self._random, len(clipped_sum)):
            # Integers, in float64: below 2^53 there is nothing between them, so the sum is that of the integers.
            steps = clipped_sum[part].astype(np.float64)
            steps /= step
            np.rint(steps, out=steps)
            steps += noise
            steps *= step / expected
            mean[part] = steps
        return mean

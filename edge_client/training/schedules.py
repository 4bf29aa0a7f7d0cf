"""Learning-rate schedules: pure functions of the optimizer step."""

from __future__ import annotations

import math

from edgetrain.protocol.training import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, local_steps: int) -> float:
    """What the learning rate is multiplied by.

    Warm-up is a line from 0 (before the first step) to 1: step i of w has (i + 1) / w, so that no step is
    wasted on a learning rate of 0. The named schedule then starts at its own step 0. Noam contains its
    warm-up.

    Args:
        config: the schedule.
        step: optimizer step, from 0.
        local_steps: steps of this local training, where the schedule does not say `total_steps`.

    Returns:
        A factor of at least 0, and at most 1 unless `gamma` is above 1.
    """
    warmup = config.warmup_steps
    if config.name == "noam":
        count, peak = step + 1, max(warmup, 1)
        return min(math.sqrt(peak / count), count / peak)
    if step < warmup:
        return (step + 1) / warmup
    step -= warmup
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return math.pow(config.gamma, step // config.step_size)
    total = config.total_steps or max(local_steps - warmup, 1)
    done = min(step / total, 1.0)
    return 1 - done if config.name == "linear" else (1 + math.cos(math.pi * done)) / 2

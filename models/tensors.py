"""From numpy samples to torch batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgetrain.models.data.samples import Samples, map_leaves, take
from edgetrain.models.errors import ModelError


def to_tensors(samples: Samples[Any]) -> tuple[Any, Any]:
    """`(inputs, targets)` as tensors in the same structure."""
    inputs, targets = (map_leaves(torch.from_numpy, half) for half in samples)
    return inputs, targets


def example_batch(samples: Samples[Any], batch_size: int) -> tuple[Any, Any]:
    """The first `batch_size` samples, as tensors.

    Raises:
        ModelError: `batch_size` is not between 1 and the number of samples.
    """
    if not 1 <= batch_size <= len(samples.targets):
        raise ModelError(f"batch_size is {batch_size}; the data allows 1 to {len(samples.targets)}")
    return to_tensors(take(samples, np.arange(batch_size)))

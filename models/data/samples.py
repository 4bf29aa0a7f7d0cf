"""Samples, and what can be done with them whatever their structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
"""The target of a token that counts for nothing (padding). torch's default `ignore_index`."""

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# The inputs' structure: an array, a tuple of arrays or a dict of arrays, with the sample as dimension 0.
Inputs = TypeVar("Inputs")


class Samples(NamedTuple, Generic[Inputs]):
    """Inputs and targets of N samples."""

    inputs: Inputs
    # Classes [N], or tokens [N, T].
    targets: Ints


class Dataset(NamedTuple, Generic[Inputs]):
    """What to learn from, and what is held out."""

    train: Samples[Inputs]
    test: Samples[Inputs]


def map_leaves(function: Callable[[npt.NDArray[Any]], Any], half: Any) -> Any:
    """Applies `function` to every array of an array, a tuple or a dict, and keeps the structure."""
    if isinstance(half, dict):
        return {key: function(leaf) for key, leaf in half.items()}
    if isinstance(half, tuple):
        return tuple(function(leaf) for leaf in half)
    return function(half)


def take(samples: Samples[Inputs], indices: Ints) -> Samples[Inputs]:
    """The samples at `indices`, copied: a client's shard, or a batch."""
    return Samples(map_leaves(lambda leaf: leaf[indices], samples.inputs), samples.targets[indices])


def batches(samples: Samples[Inputs], batch_size: int, *, epochs: int, seed: int) -> Iterator[Samples[Inputs]]:
    """Shuffled batches; every sample once an epoch, the last batch of an epoch may be smaller."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(samples.targets))
        for start in range(0, len(order), batch_size):
            yield take(samples, order[start : start + batch_size])


def token_weights(targets: Ints) -> Floats:
    """Weights [N, T] for a loss per token: 0 where the target is `IGNORE_INDEX`, else 1."""
    weights: Floats = (targets != IGNORE_INDEX).astype(np.float32)
    return weights


def held_out(inputs: Inputs, targets: Ints, *, test_fraction: float, seed: int) -> Dataset[Inputs]:
    """A seeded random split."""
    samples = Samples(inputs, targets)
    order = np.random.default_rng(seed).permutation(len(targets))
    num_test = math.ceil(test_fraction * len(targets))
    return Dataset(train=take(samples, order[num_test:]), test=take(samples, order[:num_test]))

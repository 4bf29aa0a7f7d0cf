"""Splitting one data set among clients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgetrain.models.data.samples import Ints
from edgetrain.models.errors import ModelError


def iid_split(num_samples: int, num_clients: int, seed: int) -> list[Ints]:
    """Shuffles and deals: every sample to one client, sizes equal to within one.

    Returns:
        One sorted index array per client.

    Raises:
        ModelError: fewer samples than clients, or no client.
    """
    _check(num_samples, num_clients, 1)
    order = np.random.default_rng(seed).permutation(num_samples)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet_split(
    targets: npt.NDArray[np.generic], num_clients: int, alpha: float, seed: int, min_per_client: int = 1
) -> list[Ints]:
    """Splits with skewed labels: every sample to one client.

    Label skew from a Dirichlet distribution is due to Hsu, Qi and Brown 2019, "Measuring the Effects of
    Non-Identical Data Distribution for Federated Visual Classification". Theirs draws each client's mix of
    classes and keeps sizes equal; this draws each class's shares of the clients, as Yurochkin et al. 2019
    (section 4) do, so that sizes differ too, as they do among real devices.

    Args:
        targets: classes [N].
        num_clients: how many parts.
        alpha: concentration, > 0. 100 is nearly IID, 1 is skewed, 0.1 leaves most clients a class or two.
        seed: the same seed gives the same split.
        min_per_client: clients that drew fewer get random samples from whoever then has most.

    Returns:
        One sorted index array per client.

    Raises:
        ModelError: too few samples, no client, or `alpha` is not positive.
    """
    targets = np.asarray(targets)
    if targets.ndim != 1:
        raise ModelError(f"targets have shape {targets.shape}; a split by class needs one class per sample")
    _check(len(targets), num_clients, min_per_client)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ModelError(f"alpha is {alpha}; it must be positive, e.g. 0.5")
    rng = np.random.default_rng(seed)
    owner = np.empty(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        ends = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(members)
        for client, part in enumerate(np.split(members, np.rint(ends).astype(np.int64))):
            owner[part] = client
    _top_up(owner, num_clients, min_per_client, rng)
    return [np.flatnonzero(owner == client) for client in range(num_clients)]


def _top_up(owner: Ints, num_clients: int, minimum: int, rng: np.random.Generator) -> None:
    sizes = np.bincount(owner, minlength=num_clients)
    while sizes.min() < minimum:
        poorest, richest = int(sizes.argmin()), int(sizes.argmax())
        owner[rng.choice(np.flatnonzero(owner == richest))] = poorest
        sizes[poorest] += 1
        sizes[richest] -= 1


def _check(num_samples: int, num_clients: int, minimum: int) -> None:
    if num_clients < 1:
        raise ModelError(f"num_clients is {num_clients}; it must be at least 1")
    if num_samples < num_clients * minimum:
        raise ModelError(
            f"{num_samples} samples cannot give {num_clients} clients {minimum} each; ask for fewer clients"
        )

"""Norm bounding: no client moves the parameters by more than so much.

Sun et al., "Can You Really Backdoor Federated Learning?", 2019: an attacker who may claim anything is held
to what an honest client could do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from edgetrain.coordinator.errors import UpdateRefused
from edgetrain.coordinator.strategies.base import Contribution, Setting, Strategy
from edgetrain.coordinator.strategies.fedavg import fedavg
from edgetrain.protocol.codecs import SparseOrDense
from edgetrain.protocol.errors import ConfigError


def norm_bound(
    *,
    inner: Strategy | None = None,
    max_norm: Annotated[float, Meta(gt=0)],
    action: Literal["clip", "refuse"] = "clip",
) -> Strategy:
    """Bounds every delta before another strategy sees it.

    Args:
        inner: what averages; FedAvg if left out.
        max_norm: largest L2 norm of a delta.
        action: clip scales longer ones down, refuse sends them back.

    Raises:
        ConfigError: around a strategy that it cannot protect.
    """
    wrapped = inner or fedavg()
    layers = wrapped.layers or (wrapped.name,)
    if "norm-bound" in layers:
        raise ConfigError("strategy 'norm-bound' around 'norm-bound': the smaller bound does it alone")
    if wrapped.private is not None:
        raise ConfigError(f"strategy 'norm-bound' around {wrapped.name!r}: that clips every delta by itself")
    if wrapped.control is not None:
        raise ConfigError(
            f"strategy 'norm-bound' around {wrapped.name!r}: it bounds deltas, not the control variates that "
            "clients send beside them, so it would protect nothing"
        )

    def fold(partial: Any, contribution: Contribution) -> Any:
        update = contribution.update
        norm = float(np.linalg.norm(update.values.astype(np.float64)))
        if norm > max_norm:
            if action == "refuse":
                raise UpdateRefused(f"the update has norm {norm:.4g}, allowed is {max_norm:g}")
            values = (update.values.astype(np.float64) * (max_norm / norm)).astype(np.float32)
            update = SparseOrDense(update.num_parameters, update.indices, values)
            contribution = replace(contribution, update=update)
        return wrapped.fold(partial, contribution)

    def objection(setting: Setting) -> str | None:
        if setting.only_sums:
            return "only sums of updates are seen: a single one cannot be bounded here, let the clients clip"
        return wrapped.objection(setting)

    return replace(wrapped, name="norm-bound", fold=fold, layers=("norm-bound", *layers), objection=objection)

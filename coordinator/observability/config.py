"""Settings of what is shown."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ObservabilityConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[observability]."""

    # Serve /metrics for Prometheus on this port; 0 for not at all.
    prometheus_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    # Its address. There is no password: leave it on the loopback, or put a proxy before it.
    prometheus_host: str = "127.0.0.1"
    # Write TensorBoard event files into the run directory's tensorboard/.
    tensorboard: bool = False
    # Write every event as a line of JSON into the run directory's events.jsonl.
    events: bool = True

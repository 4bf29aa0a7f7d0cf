"""What a run shows to machines: Prometheus, TensorBoard, structured logs. All of them are observers."""

from edgetrain.coordinator.observability.config import ObservabilityConfig
from edgetrain.coordinator.observability.observers import observers

__all__ = ["ObservabilityConfig", "observers"]

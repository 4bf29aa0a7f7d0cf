"""How the names of graph inputs and outputs begin; in which order they stand: `edgetrain.protocol.manifest`."""

from __future__ import annotations

# Before the name of a parameter.
PARAMETER, SCALE, GRADIENT = "parameters.", "scales.", "gradients."
# Before the name of a metric.
METRIC = "metrics."
# Before a number, from 0.
FEATURE = "features."

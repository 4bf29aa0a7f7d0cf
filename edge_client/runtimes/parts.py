"""A bundle's step in two parts: the frozen `trunk`, and the head that learns on its features."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from edgetrain.edge_client.errors import SessionError
from edgetrain.protocol.graph_names import FEATURE
from edgetrain.protocol.manifest import BatchSpec, Graph, Manifest, Structure

TRUNK = "trunk"
# Whole graph -> the part that takes its place once the features are there.
PARTS = {"step": "head_step", "eval": "head_eval"}


def parameter_specs(manifest: Manifest, graph: Graph) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """A graph's first inputs as (parameter, dtype, shape): the parameters, then scales; the trunk has none."""
    if any(spec.name.startswith(FEATURE) for spec in graph.outputs):
        return ()
    entries = manifest.parameters
    scales = [(entry.name, "float32", entry.shape[:1]) for entry in entries if entry.dtype == "int8"]
    return (*((entry.name, entry.dtype, entry.shape) for entry in entries), *scales)


def num_parameters(manifest: Manifest, graph: Graph) -> int:
    """How many of a graph's first inputs are parameters and their scales."""
    return len(parameter_specs(manifest, graph))


def head_manifest(manifest: Manifest, graphs: Mapping[str, Graph]) -> Manifest:
    """The manifest as the head sees it: the batch's inputs are a dict of features and of the leaves that it reads.

    Raises:
        SessionError: a part is missing.
    """
    if missing := {TRUNK, *PARTS.values()} - set(graphs):
        raise SessionError(f"bundle {manifest.name!r} has no graph {', '.join(sorted(missing))}: export it again")
    head = graphs[PARTS["step"]]
    read = {spec.name for spec in head.inputs}
    leaves = tuple(leaf for leaf in manifest.batch.inputs.leaves if leaf.name in read)
    features = tuple(spec for spec in graphs[TRUNK].outputs if spec.name in read)
    batch = BatchSpec(
        inputs=Structure(kind="dict", leaves=features + leaves),
        targets=manifest.batch.targets,
        weights=manifest.batch.weights,
    )
    return msgspec.structs.replace(manifest, batch=batch)

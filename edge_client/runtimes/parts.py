"""A bundle's step in two parts: the frozen `trunk`, and the head that learns on its features."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from edgetrain.edge_client.errors import SessionError
from edgetrain.protocol.manifest import BatchSpec, Graph, Manifest, Structure

TRUNK = "trunk"
# Whole graph -> the part that takes its place once the features are there.
PARTS = {"step": "head_step", "eval": "head_eval"}
# How the names of features begin.
FEATURE = "features."


def num_parameters(manifest: Manifest, graph: Graph) -> int:
    """How many of a graph's first inputs are parameters: the trunk has none."""
    is_trunk = any(spec.name.startswith(FEATURE) for spec in graph.outputs)
    return 0 if is_trunk else len(manifest.parameters)


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

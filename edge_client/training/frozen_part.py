"""Training without the frozen part: the data set's features from a cache, and a session on the head alone."""

from __future__ import annotations

import logging
from pathlib import Path

from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.errors import DataError, StateError
from edgetrain.edge_client.runtimes.base import Session
from edgetrain.edge_client.runtimes.parts import TRUNK
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.feature_cache import cache_features
from edgetrain.protocol.manifest import STEP_CLIPPED

logger = logging.getLogger(__name__)


def keeps_features(session: Session, config: ClientConfig) -> bool:
    """Whether a client trains on the features of a bundle, unless its data or its disk are against it."""
    graphs = session.manifest.program(session.runtime).graphs
    # Clipping each sample's gradient takes the whole graph.
    return config.feature_cache != "off" and TRUNK in graphs and STEP_CLIPPED not in graphs


def skip_frozen_part(
    session: Session,
    training: Dataset,
    validation: Dataset | None,
    *,
    bundle: bytes,
    directory: Path,
    config: ClientConfig,
) -> tuple[Session, Dataset, Dataset | None]:
    """Replaces inputs by features, if that can be done; otherwise gives back what it was given.

    Args:
        session: whole; if it is replaced, nothing needs it any more.
        training: local data.
        validation: local data to evaluate on.
        bundle: digest of the bundle.
        directory: where the caches are.
        config: whether, how precise and how large.
    """
    precision = config.feature_cache
    if precision == "off" or not keeps_features(session, config):
        if precision != "off" and TRUNK in session.manifest.program(session.runtime).graphs:
            logger.info("feature cache off: the bundle clips the gradient of each sample")
        return session, training, validation
    if training.augment is not None:
        logger.info("feature cache off: the data changes in every epoch (augment)")
        return session, training, validation
    parts = {"training": training} | ({} if validation is None else {"validation": validation})
    replaced: dict[str, Dataset] = {}
    left = config.max_feature_cache_bytes
    for name, part in parts.items():
        try:
            cached = cache_features(
                session,
                part,
                directory / f"features-{name}.bin",
                bundle=bundle,
                precision=precision,
                max_bytes=left,
            )
        except (StateError, DataError) as error:
            logger.warning("feature cache off: %s. Training goes on without it, more slowly", error)
            return session, training, validation
        left -= cached.size
        replaced[name] = cached.dataset
        logger.info(
            "%s features of %d samples as %s: %.1f MB, relative error %.1e",
            "kept" if cached.reused else "computed",
            len(part),
            precision,
            cached.size / 1e6,
            cached.error,
        )
    # The trunk's memory first: both at once would be the most that this process ever takes.
    session.release()
    head = session.head()
    assert head is not None, "it has a trunk"
    return head, replaced["training"], replaced.get("validation")

"""Data for the reference models: real where the Python installation brings some, else made by rule.

Nothing here imports torch, so devices can use it too. Everything is seeded: the same call gives the same
arrays. A data set is `(train, test)`, each `(inputs, targets)`.
"""

from edgetrain.models.data.digits import digits
from edgetrain.models.data.samples import (
    IGNORE_INDEX,
    Dataset,
    Samples,
    batches,
    map_leaves,
    take,
    token_weights,
)
from edgetrain.models.data.split import dirichlet_split, iid_split

__all__ = [
    "IGNORE_INDEX",
    "Dataset",
    "Samples",
    "batches",
    "digits",
    "dirichlet_split",
    "iid_split",
    "map_leaves",
    "take",
    "token_weights",
]

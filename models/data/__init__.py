"""Data for the reference models: real where the Python installation brings some, else made by rule.

Nothing here imports torch, so devices can use it too. Everything is seeded: the same call gives the same
arrays. A data set is `(train, test)`, each `(inputs, targets)`.
"""

from edgetrain.models.data.audio import keywords, mfcc
from edgetrain.models.data.digits import digits
from edgetrain.models.data.images import rgb_digits, shapes
from edgetrain.models.data.numbers import exact_matches, greedy_decode, spell, spelled_numbers
from edgetrain.models.data.registry import DATA, get_data
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
from edgetrain.models.data.text import next_characters, next_words, topic_paragraphs, topics

__all__ = [
    "DATA",
    "IGNORE_INDEX",
    "Dataset",
    "Samples",
    "batches",
    "digits",
    "dirichlet_split",
    "exact_matches",
    "get_data",
    "greedy_decode",
    "iid_split",
    "keywords",
    "map_leaves",
    "mfcc",
    "next_characters",
    "next_words",
    "rgb_digits",
    "shapes",
    "spell",
    "spelled_numbers",
    "take",
    "token_weights",
    "topic_paragraphs",
    "topics",
]

"""The data set of each reference model, by the model's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from edgetrain.models.data.audio import keywords
from edgetrain.models.data.digits import digits
from edgetrain.models.data.images import rgb_digits, shapes
from edgetrain.models.data.numbers import spelled_numbers
from edgetrain.models.data.samples import Dataset
from edgetrain.models.data.text import next_characters, topic_paragraphs
from edgetrain.models.errors import ModelError

DATA: Mapping[str, tuple[Callable[..., Dataset[Any]], Mapping[str, Any]]] = MappingProxyType(
    {
        "digits-cnn": (digits, {}),
        "mobilenet-v2": (rgb_digits, {"size": 128}),
        "ds-cnn": (keywords, {}),
        "resnet-8": (shapes, {}),
        "char-lm": (next_characters, {}),
        "bert-tiny": (topic_paragraphs, {}),
        "vit-tiny": (rgb_digits, {}),
        "seq2seq": (spelled_numbers, {}),
    }
)
"""Model name -> what makes its data, and the options that make it fit the model's defaults."""


def get_data(name: str, **options: Any) -> Dataset[Any]:
    """The data set of a reference model.

    Args:
        name: a model of `edgetrain.models.MODELS`.
        options: of the function in `DATA`, e.g. `num_train=200`.

    Returns:
        `(train, test)` in the structure of the model's example batch.

    Raises:
        ModelError: unknown name, or an option that the data set does not take.
    """
    try:
        make, defaults = DATA[name]
    except KeyError:
        raise ModelError(f"no data for a model {name!r}; choose one of {', '.join(DATA)}") from None
    accepted = inspect.signature(make).parameters
    unknown = sorted(options.keys() - accepted.keys())
    if unknown:
        raise ModelError(f"the data of {name!r} does not take {', '.join(unknown)}; it takes {', '.join(accepted)}")
    return make(**{**defaults, **options})

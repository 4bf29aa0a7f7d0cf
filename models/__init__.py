"""Reference CNNs and Transformers with their losses and data, by name.

Importing this package, or `edgetrain.models.data`, imports no torch: a model's own file does, when
`get_model` is asked for it.
"""

from edgetrain.models.errors import ModelError
from edgetrain.models.registry import MODELS, ModelSource, get_model

__all__ = ["MODELS", "ModelError", "ModelSource", "get_model"]

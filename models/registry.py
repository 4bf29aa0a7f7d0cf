"""Models by name. Imports no torch until a model is asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from edgetrain.models.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn


class ModelSource(NamedTuple):
    """What an export needs of a model."""

    module: nn.Module
    # loss(outputs, targets) -> one loss per sample [B], or per token [B, T].
    loss: Callable[[Any, Any], torch.Tensor]
    # (inputs, targets); each a tensor, a tuple or a dict of tensors. The module is called with a tuple
    # unpacked to positions and a dict to keywords.
    example_batch: tuple[Any, Any]


MODELS: Mapping[str, str] = MappingProxyType(
    {
        "digits-cnn": "edgetrain.models.digits_cnn:digits_cnn",
        "mobilenet-v2": "edgetrain.models.mobilenet_v2:mobilenet_v2",
        "ds-cnn": "edgetrain.models.ds_cnn:ds_cnn",
        "resnet-8": "edgetrain.models.resnet_8:resnet_8",
        "char-lm": "edgetrain.models.char_lm:char_lm",
        "bert-tiny": "edgetrain.models.bert_tiny:bert_tiny",
        "vit-tiny": "edgetrain.models.vit_tiny:vit_tiny",
        "seq2seq": "edgetrain.models.seq2seq:seq2seq",
    }
)
"""Name -> the `module:function` that builds it."""


def get_model(name: str, *, seed: int = 0, **options: Any) -> ModelSource:
    """Builds a reference model with random weights.

    The caller's random state is left as it was.

    Args:
        name: one of `MODELS`.
        seed: the same seed and options give the same weights and the same example batch.
        options: what the model takes, e.g. `batch_size=16` or, for mobilenet-v2, `width=0.5`.

    Raises:
        ModelError: unknown name, or an option that the model does not take or cannot use.
    """
    build = _builder(name)
    accepted = inspect.signature(build).parameters
    unknown = sorted(options.keys() - accepted.keys())
    if unknown:
        raise ModelError(
            f"model {name!r} does not take {', '.join(unknown)}; it takes {', '.join(['seed', *accepted])}"
        )
    import torch  # noqa: PLC0415  # only here, so that clients can list the names

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**options)


def _builder(name: str) -> Callable[..., ModelSource]:
    try:
        path = MODELS[name]
    except KeyError:
        raise ModelError(f"no model {name!r}; choose one of {', '.join(MODELS)}") from None
    module, _, function = path.partition(":")
    build: Callable[..., ModelSource] = getattr(importlib.import_module(module), function)
    return build

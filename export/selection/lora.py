"""Low-rank adapters; see `edgetrain.export.selection.adapters`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetrain.export.errors import SelectionError
from edgetrain.export.selection.adapters import (
    Adapters,
    Weights,
    is_linear,
    is_transposed,
    join,
    number,
    read_options,
    targets,
)


def add_lora(module: nn.Module, term: str, adapters: Adapters) -> None:
    """Adds `lora_A` [r, in] and `lora_B` [out, r] to each layer that the term names.

    Raises:
        SelectionError: the term cannot be read or no layer fits; the message lists those that would.
    """
    options = read_options(term)
    r = number(term, options, "r", 8)
    alpha = number(term, options, "alpha", 2 * r)
    if r != int(r):
        raise SelectionError(f"selection term {term!r}: r must be a whole number, got {r}")
    names: list[str] = []
    for path in targets(module, term, options, is_linear):
        layer = module.get_submodule(path)
        if hasattr(layer, "lora_A"):
            raise SelectionError(f"selection term {term!r}: {path} has an adapter already")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        transposed = is_transposed(layer)
        n_out, n_in = reversed(weight.shape) if transposed else weight.shape
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(n_in)
        A = torch.empty(int(r), n_in).uniform_(-bound, bound, generator=generator)
        layer.register_parameter("lora_A", nn.Parameter(A))
        layer.register_parameter("lora_B", nn.Parameter(torch.zeros(n_out, int(r))))
        layer.register_forward_hook(_lora_hook(alpha / r), with_kwargs=True)
        names += [join(path, "lora_A"), join(path, "lora_B")]
        adapters.merges.append(_merge_lora(path, weight.detach(), alpha / r, transposed=transposed))
    adapters.names[term] = tuple(names)


def _lora_hook(scale: float) -> Callable[..., Tensor]:
    def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return output + F.linear(F.linear(x, layer.lora_A), layer.lora_B) * scale

    return add


def _merge_lora(path: str, frozen: Tensor, scale: float, *, transposed: bool) -> Callable[[Weights], None]:
    def merge(weights: Weights) -> None:
        A, B = weights.pop(join(path, "lora_A")), weights.pop(join(path, "lora_B"))
        weight = weights.get(join(path, "weight"), frozen)
        change = torch.matmul(B, A) * scale
        weights[join(path, "weight")] = weight + (change.T if transposed else change)

    return merge

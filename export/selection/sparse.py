"""Slices of weights that learn; see `edgetrain.export.selection.adapters`."""

from __future__ import annotations

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

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class SlicedLayer(nn.Module):
    """A linear layer or convolution whose weight is a part that learns and a part that does not.

    Args:
        layer: the original.
        count: channels that learn, the first ones.
        outputs: whether they are output channels.
    """

    rest: Tensor

    def __init__(self, layer: Any, count: int, *, outputs: bool) -> None:
        super().__init__()
        weight: Tensor = layer.weight.detach()
        axis = channel_axis(layer, outputs=outputs)
        self.weight = nn.Parameter(weight.narrow(axis, 0, count).clone())
        self.register_buffer("rest", weight.narrow(axis, count, weight.shape[axis] - count).clone())
        self.bias: nn.Parameter | None = layer.bias
        self.count = count
        self.outputs = outputs
        self.transposed = is_transposed(layer)
        self.convolution = _CONVOLUTIONS.get(type(layer))
        self.groups: int = getattr(layer, "groups", 1)
        self.options = (layer.stride, layer.padding, layer.dilation) if self.convolution else ()

    def forward(self, x: Tensor) -> Tensor:
        """As the original layer."""
        axis = 1 if self.convolution else -1
        if not self.outputs:
            learning, frozen = torch.split(x, [self.count, x.shape[axis] - self.count], axis)
            y = self._partial(learning, self.weight, 1) + self._partial(frozen, self.rest, 1)
        elif self.groups == 1:
            y = torch.cat([self._partial(x, self.weight, 1), self._partial(x, self.rest, 1)], axis)
        else:
            per_group = (self.count + self.rest.shape[0]) // self.groups
            groups = self.count // per_group
            inputs = groups * self.weight.shape[1]
            learning, frozen = torch.split(x, [inputs, x.shape[1] - inputs], 1)
            first = self._partial(learning, self.weight, groups)
            y = torch.cat([first, self._partial(frozen, self.rest, self.groups - groups)], 1)
        if self.bias is None:
            return y
        return y + (self.bias.view(-1, *[1] * (y.ndim - 2)) if self.convolution else self.bias)

    def _partial(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.convolution:
            return self.convolution(x, weight, None, *self.options, groups)
        return x @ weight if self.transposed else F.linear(x, weight)


def channel_axis(layer: nn.Module, *, outputs: bool) -> int:
    """The dimension of a layer's weight that counts its output or input channels."""
    return int(outputs == is_transposed(layer))


def add_slices(module: nn.Module, term: str, adapters: Adapters) -> None:
    """Splits the weight of each layer that the term names.

    Raises:
        SelectionError: the term cannot be read or no layer fits; the message lists those that would.
    """
    options = read_options(term)
    fraction = number(term, options, "fraction", 0.25)
    dim = options.pop("dim", "out")
    if dim not in ("in", "out") or fraction >= 1:
        raise SelectionError(f"selection term {term!r}: dim must be in or out, and fraction below 1")
    outputs = dim == "out"
    tied = _tied(module)
    names: list[str] = []
    for path in targets(module, term, options, lambda part: _fits(part, tied, outputs=outputs)):
        layer: Any = module.get_submodule(path)
        if not path:
            raise SelectionError(f"selection term {term!r}: the model is itself a layer; wrap it in a module")
        step, units = _units(layer, outputs=outputs)
        count = step * min(max(round(fraction * units), 1), units - 1)
        sliced = SlicedLayer(layer, count, outputs=outputs)
        parent, _, child = path.rpartition(".")
        setattr(module.get_submodule(parent), child, sliced)
        name = join(path, "weight")
        names.append(name)
        adapters.sparse[name] = tuple(range(count))
        adapters.merges.append(_merge_slice(name, sliced.rest, channel_axis(layer, outputs=outputs)))
    adapters.names[term] = tuple(names)


def _tied(module: nn.Module) -> set[int]:
    """Parameters that several modules own."""
    owned = [id(p) for part in module.modules() for p in part._parameters.values() if p is not None]  # noqa: SLF001
    return {key for key in owned if owned.count(key) > 1}


def _fits(part: Any, tied: set[int], *, outputs: bool) -> bool:
    if not (is_linear(part) or type(part) in _CONVOLUTIONS) or id(part.weight) in tied:
        return False
    if getattr(part, "padding_mode", "zeros") != "zeros" or (getattr(part, "groups", 1) > 1 and not outputs):
        return False
    return _units(part, outputs=outputs)[1] > 1


def _units(layer: Any, *, outputs: bool) -> tuple[int, int]:
    """Channels that can only be cut together (those of a group), and how many such units there are."""
    channels: int = layer.weight.shape[channel_axis(layer, outputs=outputs)]
    groups: int = getattr(layer, "groups", 1)
    return (1, channels) if groups == 1 else (channels // groups, groups)


def _merge_slice(name: str, rest: Tensor, axis: int) -> Callable[[Weights], None]:
    def merge(weights: Weights) -> None:
        weights[name] = torch.cat([weights[name], rest], axis)

    return merge

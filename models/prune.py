"""Making a model smaller before it is exported: by magnitude, weight by weight or channel by channel.

Weight by weight (Han et al. 2015, "Learning both weights and connections"): `magnitude_masks` says which
weights stay, `apply_masks` zeroes the others; after every optimizer step again, while fine-tuning.

Channel by channel (Li et al. 2017, "Pruning filters for efficient ConvNets"): `strongest_channels` of a
layer, then `keep_outputs` of that layer, `keep_channels` of its normalization and `keep_inputs` of the layers
that read it give smaller layers with the same weights. Only this makes a dense runtime faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from edgetrain.models.errors import ModelError

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def magnitude_masks(module: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
    """Which weights are among the largest of the whole module.

    Only parameters with two or more dimensions take part: biases and normalizations are few and matter.

    Args:
        module: left as it is.
        sparsity: share of those weights to drop, 0 <= sparsity < 1.

    Returns:
        Parameter name -> bool mask of its shape, True where a weight stays.

    Raises:
        ModelError: `sparsity` is out of range, or there is nothing to prune.
    """
    if not 0 <= sparsity < 1:
        raise ModelError(f"sparsity is {sparsity}; it must be at least 0 and below 1")
    weights = {name: p.detach().abs() for name, p in module.named_parameters() if p.dim() >= 2}
    if not weights:
        raise ModelError(f"{type(module).__name__} has no parameter of two or more dimensions to prune")
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    dropped = round(sparsity * everything.numel())
    keep = torch.ones(everything.numel(), dtype=torch.bool)
    # By rank, not by threshold: equal weights do not change the count.
    keep[everything.argsort(stable=True)[:dropped]] = False
    parts = torch.split(keep, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


@torch.no_grad()
def apply_masks(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Zeroes in place what the masks drop.

    Raises:
        ModelError: a mask that fits no parameter of the module.
    """
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ModelError(f"the mask for {name!r} of shape {tuple(mask.shape)} fits no parameter")
        parameters[name].mul_(mask)


def strongest_channels(layer: nn.Conv2d | nn.Linear, count: int) -> torch.Tensor:
    """The `count` output channels whose weights have the largest L1 norm: int64 [count], ascending.

    Raises:
        ModelError: `count` is not between 1 and the number of channels.
    """
    norms = layer.weight.detach().abs().flatten(1).sum(1)
    if not 1 <= count <= len(norms):
        raise ModelError(f"cannot keep {count} of {len(norms)} channels")
    return norms.argsort(descending=True, stable=True)[:count].sort().values


def keep_outputs(layer: Layer, channels: torch.Tensor) -> Layer:
    """A new layer with these output channels. A depthwise convolution loses the same inputs.

    Raises:
        ModelError: a convolution with groups that is not depthwise.
    """
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        if not layer.groups == layer.in_channels == layer.out_channels:
            raise ModelError(f"cannot prune a convolution of {layer.groups} groups that is not depthwise")
        return _convolution(layer, channels, torch.arange(1), groups=len(channels))
    inputs = torch.arange(layer.weight.shape[1])
    return cast("Layer", _rebuilt(layer, channels, inputs))


def keep_inputs(layer: Layer, channels: torch.Tensor, *, repeat: int = 1) -> Layer:
    """A new layer that reads only these input channels.

    Args:
        layer: a convolution without groups, or a linear layer.
        channels: of the layer before.
        repeat: features per channel, for a linear layer behind a flattened [B, C, H, W]: H * W.

    Raises:
        ModelError: a convolution with groups.
    """
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ModelError("a convolution with groups loses its inputs with its outputs: use keep_outputs")
    inputs = (channels[:, None] * repeat + torch.arange(repeat)).flatten()
    return cast("Layer", _rebuilt(layer, torch.arange(layer.weight.shape[0]), inputs))


def keep_channels(norm: nn.BatchNorm2d, channels: torch.Tensor) -> nn.BatchNorm2d:
    """A new BatchNorm over these channels, with their statistics."""
    new = nn.BatchNorm2d(len(channels), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    state = {name: value[channels] if value.dim() else value for name, value in norm.state_dict().items()}
    new.load_state_dict(state)
    return new.train(norm.training)


def _rebuilt(layer: nn.Conv2d | nn.Linear, outputs: torch.Tensor, inputs: torch.Tensor) -> nn.Conv2d | nn.Linear:
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer, outputs, inputs, groups=1)
    new = nn.Linear(len(inputs), len(outputs), bias=layer.bias is not None)
    _copy(layer, new, outputs, inputs)
    return new


def _convolution(layer: nn.Conv2d, outputs: torch.Tensor, inputs: torch.Tensor, *, groups: int) -> nn.Conv2d:
    new = nn.Conv2d(
        len(inputs) * groups,
        len(outputs),
        cast("tuple[int, int]", layer.kernel_size),
        cast("tuple[int, int]", layer.stride),
        cast("tuple[int, int]", layer.padding),
        cast("tuple[int, int]", layer.dilation),
        groups,
        layer.bias is not None,
        layer.padding_mode,
    )
    _copy(layer, new, outputs, inputs)
    return new


@torch.no_grad()
def _copy(old: nn.Conv2d | nn.Linear, new: nn.Conv2d | nn.Linear, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
    new.weight.copy_(old.weight[outputs][:, inputs])
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(old.bias[outputs])

"""The geometry of a two-dimensional convolution, and which form of `convolution` its shapes ask for.

Shape letters as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from edgetrain.export.graph.pooling import per_dimension

aten = torch.ops.aten

# `strided` is left to onnxruntime but for the gradient of the weight.
Kind = Literal["whole", "band", "gathered", "wide", "strided"]

# Pixels in times pixels out up to which a channel's whole convolution as one matrix is less work than its rows.
_MAX_WHOLE = 1024
# Length of the short side up to which a band matrix, mostly zeros, beats the loop over channels.
_MAX_BAND = 16
# Channels times taps up to which a convolution of few channels is a product with the gathered taps.
_MAX_GATHERED, _FEW_CHANNELS = 64, 4


@dataclass(frozen=True)
class Side:
    """A convolution along one side of the image."""

    size: int
    positions: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def first(self, tap: int) -> int:
        """What the first output position reads at this tap; negative in the padding."""
        return tap * self.dilation - self.padding

    def gather(self, x: Tensor, dim: int) -> list[Tensor]:
        """What the output positions read at every tap."""
        if self.stride == 1:
            return [
                pad(x, dim, -self.first(tap), self.first(tap) + self.positions - self.size)
                for tap in range(self.kernel)
            ]
        reach = (self.positions - 1) * self.stride + 1
        padded = pad(x, dim, self.padding, self.first(self.kernel - 1) + reach - self.size)
        starts = [tap * self.dilation for tap in range(self.kernel)]
        return [aten.slice.Tensor(padded, dim, start, start + reach, self.stride) for start in starts]

    def scatter(self, x: Tensor, cut: int, dim: int) -> Tensor:
        """The transposed of `gather`: adds every tap, a part of dimension `cut`, where it was read."""
        if self.stride == 1:
            rest = self.size - self.positions
            firsts = [self.first(tap) for tap in range(self.kernel)]
            return add_up(pad_parts(x, cut, dim, [(first, rest - first) for first in firsts]))
        length = -(-(self.size + self.padding) // self.stride)
        length = max(length, self.positions + (self.kernel - 1) * self.dilation // self.stride)
        taps = [divmod(tap * self.dilation, self.stride) for tap in range(self.kernel)]
        parts = pad_parts(x, cut, dim, [(shift, length - self.positions - shift) for shift, _ in taps])
        if len({phase for _, phase in taps}) < self.stride:
            # Zeros in between; made as tensors, they would be stored in the program.
            spread = [
                pad(part.unsqueeze(dim + 1), dim + 1, phase, self.stride - 1 - phase)
                for (_, phase), part in zip(taps, parts, strict=True)
            ]
            whole = add_up(spread).flatten(dim, dim + 1)
        else:
            met = [
                add_up([part for (_, own), part in zip(taps, parts, strict=True) if own == phase])
                for phase in range(self.stride)
            ]
            whole = torch.stack(met, dim + 1).flatten(dim, dim + 1)
        return pad(whole, dim, -self.padding, self.size + self.padding - length * self.stride)


@dataclass(frozen=True)
class Form:
    """How one convolution is computed."""

    kind: Kind
    # Whether the image's width, not its height, is X.
    flipped: bool
    x: Side
    y: Side

    def enter(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [C, X, Y, B]."""
        return image.permute(1, 3, 2, 0) if self.flipped else image.permute(1, 2, 3, 0)

    def leave(self, image: Tensor) -> Tensor:
        """[C, X, Y, B] -> [B, C, H, W]."""
        return image.permute(3, 0, 2, 1) if self.flipped else image.permute(3, 0, 1, 2)

    def kernel(self, weight: Tensor) -> Tensor:
        """[O, I, kh, kw] with the taps in the order X, Y, and the other way round."""
        return weight.transpose(2, 3) if self.flipped and self.x.kernel * self.y.kernel > 1 else weight


def choose(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> Form | None:
    """The form for a convolution, by its shapes; None to leave it as it is, as one with constant weights."""
    if x.ndim != 4 or transposed or not _varies(weight):
        return None
    sides = [
        Side(size, (size + 2 * p - d * (k - 1) - 1) // s + 1, k, s, p, d)
        for size, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], *(per_dimension(v, 2) for v in (stride, padding, dilation)), strict=True
        )
    ]
    flipped = x.shape[3] < x.shape[2]
    side_x, side_y = reversed(sides) if flipped else sides
    C, K = x.shape[1], side_x.kernel * side_y.kernel
    kind: Kind
    if groups > 1:
        if not weight.shape[0] == groups == C or x.shape[0] == 1:
            return None
        if math.prod(side.size * side.positions for side in sides) <= _MAX_WHOLE:
            kind = "whole"
        elif side_x.size <= _MAX_BAND:
            kind = "band"
        else:
            return None
    elif K == 1 or (C <= _FEW_CHANNELS and C * K <= _MAX_GATHERED):
        kind = "gathered"
    else:
        kind = "wide" if side_x.stride == side_y.stride == 1 else "strided"
    return Form(kind, flipped, side_x, side_y)


def pad(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros before and after; negative numbers cut off."""
    return pad_parts(x, 0, dim, [(before, after)])[0]


def pad_parts(x: Tensor, cut: int, dim: int, pads: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Equal parts of dimension `cut`, each with its own numbers of zeros before and after a later dimension `dim`."""
    count, size = len(pads), x.shape[cut] // len(pads)
    outer, inner = math.prod(x.shape[:cut]), math.prod(x.shape[dim + 1 :])
    # One operator for both, on as few dimensions as possible: onnxruntime is five times slower with four.
    flat = x.reshape(*([outer] if outer > 1 else []), -1, x.shape[dim] * inner)
    height = flat.shape[-2] // count
    parts = []
    for k, (before, after) in enumerate(pads):
        ends = [before * inner, after * inner, -k * height, (k + 1 - count) * height]
        part = aten.constant_pad_nd.default(flat, ends if count > 1 else ends[:2]) if any(ends) else flat
        shape = list(x.shape)
        shape[cut], shape[dim] = size, x.shape[dim] + before + after
        parts.append(part.reshape(shape))
    return parts


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, by additions alone."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _varies(weight: Tensor) -> bool:
    """Whether it comes from an input of the traced graph; outside of a trace everything does."""
    mode = get_proxy_mode()
    if mode is None:
        return True
    slot: Any = get_proxy_slot(weight, mode.tracer, None)
    if slot is None:
        return False
    todo, seen = [getattr(slot, "proxy", slot).node], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False

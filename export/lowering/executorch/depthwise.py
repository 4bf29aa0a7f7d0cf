"""Depthwise convolutions as matrix products, for weights that change from call to call.

A channel's lines, several at a time, times a band matrix that its nine (say) weights stand in again and again: one
product for each channel does what nine multiplications and eight additions of whole images would, and reads the image
once. Strides are 1: the gradient by the input is then a convolution with the weights turned around.

Shape letters: N samples, C channels, K kernel positions, B blocks of lines in an image, S what a block reads and T what
it writes, in elements.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from edgetrain.export.lowering.executorch.products import LANES

aten = torch.ops.aten

# Multiplications for each that is needed, up to which a product is quicker: it was 1.8 times as quick at 12 and as
# quick at 13.
MOST = 12
# Blocks that a channel's product multiplies in the time in which its matrix is packed.
PACKING = 16
# Blocks of an image: so many XNNPACK concatenates at once, without leaving the delegate.
MOST_BLOCKS = 5


@dataclass(frozen=True)
class Side:
    """One dimension: result p takes value p - padding + k * dilation by tap k, or by the last but k if mirrored."""

    kernel: int
    dilation: int
    padding: int
    values: int
    results: int
    mirrored: bool = False

    def gradient(self) -> Side:
        """The values' gradient from the results'."""
        padding = self.dilation * (self.kernel - 1) - self.padding
        return Side(self.kernel, self.dilation, padding, self.results, self.values, mirrored=not self.mirrored)


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `size` results of one dimension; block j reads `span` values from `start + j * size` on."""

    side: Side
    size: int

    @property
    def count(self) -> int:
        """Of blocks, of which the last may reach beyond the results."""
        return -(-self.side.results // self.size)

    @property
    def start(self) -> int:
        """The first value that is read, if there are zeros around them."""
        return 0 if self.count == 1 else -self.side.padding

    @property
    def span(self) -> int:
        """How much a block reads: of zeros around the values, a single one nothing."""
        return self.side.values if self.count == 1 else self.size + self.side.dilation * (self.side.kernel - 1)

    @property
    def around(self) -> tuple[int, int]:
        """Zeros that must stand before and after the values."""
        return max(0, -self.start), max(0, self.start + (self.count - 1) * self.size + self.span - self.side.values)

    def places(self) -> Tensor:
        """[taps, span, size]: 1 where a result takes a value by a tap."""
        value, result = torch.arange(self.span).reshape(-1, 1) + self.start, torch.arange(self.size)
        taps = torch.arange(self.side.kernel).reshape(-1, 1, 1)
        found = (value == result - self.side.padding + taps * self.side.dilation).float()
        return found.flip(0) if self.side.mirrored else found


@dataclass(frozen=True)
class Form:
    """A depthwise convolution by blocks of so many lines."""

    lines: Blocks
    line: Blocks

    def cost(self, samples: int) -> float:
        """Multiplications for each that is needed, with those by columns that stay empty.

        Every channel's band matrix is made and packed first, which takes as long as so many more blocks would.
        """
        read, written = self.lines.span * self.line.span, self.lines.size * self.line.size
        columns, taps = -(-written // LANES) * LANES, self.lines.side.kernel * self.line.side.kernel
        total = read * ((samples * self.lines.count + PACKING) * columns + taps * written)
        return total / (samples * self.lines.side.results * self.line.side.results * taps)

    def read(self, image_NHWC: Tensor) -> Tensor:
        """What blocks read of an image: [C, N * B, S]."""
        N, H, W, C = image_NHWC.shape
        above, below = self.lines.around
        x = image_NHWC.reshape(N * H * W, C).permute(1, 0).contiguous().reshape(C * N, H * W)
        if above or below:
            x = aten.constant_pad_nd.default(x, [above * W, below * W], 0.0)
        count, span = self.lines.count, self.lines.span * W
        if count > 1:
            firsts = [(above + self.lines.start + block * self.lines.size) * W for block in range(count)]
            x = torch.cat([x[:, first : first + span].contiguous() for first in firsts], 1)
        return x.reshape(C, N * count, span)

    def blocks_of(self, image_NHWC: Tensor) -> Tensor:
        """An image in the form of results: [C, N * B, T]."""
        N, H, W, C = image_NHWC.shape
        # In another shape than for `read`, so that the forward pass need not keep it for this.
        x = image_NHWC.reshape(1, N * H * W, C).permute(0, 2, 1).contiguous().reshape(C * N, H * W)
        rest = self.lines.count * self.lines.size - H
        if rest:
            x = aten.constant_pad_nd.default(x, [0, rest * W], 0.0)
        return x.reshape(C, N * self.lines.count, self.lines.size * W)

    def multiply(self, read_CBS: Tensor, weight: Tensor) -> Tensor:
        """What blocks read, times the weights [C, 1, kh, kw] -> [N, H, W, C]."""
        C, H, W = len(read_CBS), self.lines.side.results, self.line.side.results
        places = _places(self)
        bands = torch.bmm(weight.reshape(1, C, -1), places.reshape(1, *places.shape))
        x = torch.bmm(read_CBS, bands.reshape(C, read_CBS.shape[2], -1))
        if self.lines.count * self.lines.size != H:
            x = x.reshape(C, -1, self.lines.count * self.lines.size * W)[:, :, : H * W].contiguous()
        return x.reshape(C, -1).permute(1, 0).contiguous().reshape(-1, H, W, C)

    def weight_gradient(self, read_CBS: Tensor, results_CBT: Tensor, shape: torch.Size) -> Tensor:
        """Of the weights, from what blocks read and what their results are multiplied by."""
        bands = torch.bmm(read_CBS.permute(0, 2, 1), results_CBT).reshape(1, shape[0], -1)
        places = _places(self)
        return torch.bmm(bands, places.reshape(1, *places.shape).permute(0, 2, 1)).reshape(shape)


@functools.cache
def _places(form: Form) -> Tensor:
    """[K, S * T]: which elements of the band matrix hold which weight."""
    with disable_proxy_modes_tracing():
        rows, columns = form.lines.places(), form.line.places()
        return torch.einsum("krp,lcq->klrcpq", rows, columns).reshape(len(rows) * len(columns), -1).contiguous()


@functools.cache
def cheapest(rows: Side, columns: Side, samples: int) -> Form:
    """The form with the least `cost`; of images in more blocks, what they read would be gathered outside of XNNPACK."""
    sizes = range(-(-rows.results // MOST_BLOCKS), rows.results + 1)
    forms = [Form(Blocks(rows, size), Blocks(columns, columns.results)) for size in sizes]
    return min(forms, key=lambda form: form.cost(samples))

"""Two-dimensional convolutions whose weights change from call to call, in forms that onnxruntime is fast with.

Onnxruntime's convolutions want constant weights: with others a depthwise one is a loop over tiny products, and there is
none for the gradient of a weight. Its matrix product and its transposition of a matrix are fast. So images are laid out
with the channels first and the samples last, [C, X, Y, B]; the long side is Y. There,

- a shift by a pixel along Y is one cut of long rows, and 1 x 1 convolutions are one product;
- a depthwise convolution is, for every channel, one product of a band matrix made from its weights with the image;
- a dense one is a convolution of a single wide image, with the samples as neighbours and a dilation that skips them;
- the gradient of a dense weight is one product of the output gradient, shifted to every tap along X, with the input
  shifted to every tap along Y.

Layers in a row agree on the layout, so onnxruntime's optimizer removes all transpositions but the outermost. The
forward pass and the gradients make the same intermediate values, of which it keeps one.

Shape letters: B samples, C = I channels in, O out, X and Y sides of the input, P and Q of the output, K taps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot

from edgetrain.export.graph.pooling import per_dimension

aten = torch.ops.aten

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
                _pad(x, dim, -self.first(tap), self.first(tap) + self.positions - self.size)
                for tap in range(self.kernel)
            ]
        reach = (self.positions - 1) * self.stride + 1
        padded = _pad(x, dim, self.padding, self.first(self.kernel - 1) + reach - self.size)
        starts = [tap * self.dilation for tap in range(self.kernel)]
        return [aten.slice.Tensor(padded, dim, start, start + reach, self.stride) for start in starts]

    def scatter(self, x: Tensor, cut: int, dim: int) -> Tensor:
        """The transposed of `gather`: adds every tap, a part of dimension `cut`, where it was read."""
        if self.stride == 1:
            rest = self.size - self.positions
            firsts = [self.first(tap) for tap in range(self.kernel)]
            return _sum(_pad_parts(x, cut, dim, [(first, rest - first) for first in firsts]))
        length = -(-(self.size + self.padding) // self.stride)
        length = max(length, self.positions + (self.kernel - 1) * self.dilation // self.stride)
        taps = [divmod(tap * self.dilation, self.stride) for tap in range(self.kernel)]
        parts = _pad_parts(x, cut, dim, [(shift, length - self.positions - shift) for shift, _ in taps])
        if len({phase for _, phase in taps}) < self.stride:
            # Zeros in between; made as tensors, they would be stored in the program.
            spread = [
                _pad(part.unsqueeze(dim + 1), dim + 1, phase, self.stride - 1 - phase)
                for (_, phase), part in zip(taps, parts, strict=True)
            ]
            whole = _sum(spread).flatten(dim, dim + 1)
        else:
            met = [
                _sum([part for (_, own), part in zip(taps, parts, strict=True) if own == phase])
                for phase in range(self.stride)
            ]
            whole = torch.stack(met, dim + 1).flatten(dim, dim + 1)
        return _pad(whole, dim, -self.padding, self.size + self.padding - length * self.stride)


@dataclass(frozen=True)
class Form:
    """How one convolution is computed."""

    # `strided` is left to onnxruntime but for the gradient of the weight.
    kind: Literal["whole", "band", "gathered", "wide", "strided"]
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
    """The form for a convolution, by its shapes; None to leave it as it is."""
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
    kind: Literal["whole", "band", "gathered", "wide", "strided"]
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


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """`aten.convolution`."""
    del output_padding
    form = choose(x, weight, stride, padding, dilation, transposed, groups)
    O, B = weight.shape[0], x.shape[0]
    if form is None or form.kind == "strided":
        return NotImplemented
    image, kernel = form.enter(x), form.kernel(weight)
    if form.kind in ("whole", "band"):
        y = torch.bmm(_matrices(form, kernel), _rows(form, image))
    elif form.kind == "gathered":
        matrix, columns = kernel.reshape(O, -1), _columns(form, image)
        y = torch.mm(matrix, columns) if bias is None else torch.addmm(bias.reshape(O, 1), matrix, columns)
        bias = None
    else:
        y = _wide(form, image, kernel)
    y = y.reshape(O, form.x.positions, form.y.positions, B)
    return form.leave(y if bias is None else y + bias.reshape(O, 1, 1, 1))


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    form: Form,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """By the input and by the weight; of `strided` only the latter."""
    O, I = weight.shape[:2]
    C, (X, Y, B) = x.shape[1], (form.x.size, form.y.size, x.shape[0])
    taps = (form.x.kernel, form.y.kernel)
    image, kernel, dy = form.enter(x), form.kernel(weight), form.enter(grad)
    dx = dw = None
    if form.kind in ("whole", "band"):
        rows, matrices = _rows(form, image), _matrices(form, kernel)
        dy_CRN = dy.reshape(C, matrices.shape[1], rows.shape[2])
        if wanted[0]:
            spread = torch.bmm(matrices.transpose(1, 2), dy_CRN)
            if form.kind == "whole":
                dx = spread.reshape(C, X, Y, B)
            else:
                dx = form.y.scatter(spread.reshape(C, taps[1] * X, form.y.positions, B), 1, 2)
        if wanted[1]:
            product = torch.bmm(dy_CRN, rows.transpose(1, 2)).reshape(C, -1)
            dw = torch.mm(product, _placement(form, image.dtype).T).reshape(C, 1, *taps)
    elif form.kind in ("gathered", "strided"):
        dy_ON = dy.reshape(O, -1)
        if wanted[0] and form.kind == "gathered":
            # Taps first; of a single tap, that is the matrix.
            taps_first = kernel if math.prod(taps) == 1 else kernel.permute(0, 2, 3, 1)
            spread = torch.mm(taps_first.reshape(O, -1).T, dy_ON)
            spread = spread.reshape(math.prod(taps) * I, form.x.positions, form.y.positions, B)
            dx = form.y.scatter(form.x.scatter(spread, 0, 1), 0, 2)
        if wanted[1]:
            dw = torch.mm(dy_ON, _columns(form, image).T).reshape(O, I, *taps)
    else:
        dx, dw = _wide_gradients(form, image, kernel, dy, wanted)
    return None if dx is None else form.leave(dx), None if dw is None else form.kernel(dw)


def _wide(form: Form, image: Tensor, kernel: Tensor) -> Tensor:
    """[C, X, Y, B] -> [O, P, Q, B]: one product for all taps, of which those along X are then added."""
    O, B = kernel.shape[0], image.shape[3]
    product = torch.mm(_sides(kernel), _beside(form, image))
    product = product.reshape(form.x.kernel * O, form.x.size, form.y.positions, B)
    rest = form.x.positions - form.x.size
    firsts = [form.x.first(k) for k in range(form.x.kernel)]
    return _sum(_pad_parts(product, 0, 1, [(-first, first + rest) for first in firsts]))


def _wide_gradients(
    form: Form, image: Tensor, kernel: Tensor, dy: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    (O, I), B = kernel.shape[:2], image.shape[3]
    # The output's gradient where the input is along X, for each tap.
    rest = form.x.size - form.x.positions
    moved = [_pad(dy, 1, form.x.first(k), rest - form.x.first(k)) for k in range(form.x.kernel)]
    left = torch.cat(moved, 0).reshape(form.x.kernel * O, -1)
    dx = dw = None
    if wanted[0]:
        spread = torch.mm(_sides(kernel).T, left).reshape(-1, form.x.size, form.y.positions, B)
        dx = form.y.scatter(spread, 0, 2)
    if wanted[1]:
        product = torch.mm(left, _beside(form, image).T)
        dw = product.reshape(form.x.kernel, O, form.y.kernel, I).permute(0, 2, 1, 3).reshape(-1, O * I)
        dw = dw.T.reshape(O, I, form.x.kernel, form.y.kernel)
    return dx, dw


def _sides(kernel: Tensor) -> Tensor:
    """[O, I, kx, ky] -> [kx*O, ky*I], in two steps that onnxruntime has fast kernels for."""
    O, I, kx, ky = kernel.shape
    return kernel.reshape(O * I, kx * ky).T.reshape(kx, ky, O, I).permute(0, 2, 1, 3).reshape(kx * O, ky * I)


def _beside(form: Form, image: Tensor) -> Tensor:
    """The input at every tap along Y: [ky*I, X*Q*B]."""
    return torch.cat(form.y.gather(image, 2), 0).reshape(form.y.kernel * image.shape[0], -1)


def _columns(form: Form, image: Tensor) -> Tensor:
    """What every output position reads: [C, X, Y, B] -> [C*K, P*Q*B]."""
    C = image.shape[0]
    if form.x.kernel == form.y.kernel == 1:
        return form.y.gather(form.x.gather(image, 1)[0], 2)[0].reshape(C, -1)
    across = torch.stack(form.x.gather(image, 1), 1)
    both = torch.stack(form.y.gather(across, 3), 2)
    return both.reshape(C * form.x.kernel * form.y.kernel, -1)


def _rows(form: Form, image: Tensor) -> Tensor:
    """What a channel's matrix is multiplied with: [C, X*Y, B], or [C, K*X, Q*B] with the taps along Y."""
    C, X, Y, B = image.shape
    if form.kind == "whole":
        return image.reshape(C, X * Y, B)
    return torch.cat(form.y.gather(image, 2), 1).reshape(C, form.y.kernel * X, form.y.positions * B)


def _matrices(form: Form, kernel: Tensor) -> Tensor:
    """A channel's weights where its matrix has them: [C, P*Q, X*Y], or [C, P, K*X]."""
    C = kernel.shape[0]
    out = form.x.positions * (form.y.positions if form.kind == "whole" else 1)
    return torch.mm(kernel.reshape(C, -1), _placement(form, kernel.dtype)).reshape(C, out, -1)


def _placement(form: Form, dtype: torch.dtype) -> Tensor:
    with disable_proxy_modes_tracing():
        return _place(form, dtype)


@functools.lru_cache(maxsize=64)
def _place(form: Form, dtype: torch.dtype) -> Tensor:
    """Zeros and ones, [taps, entries of a channel's matrix]. The same tensor each time, so it is stored once."""
    along_x = _along(form.x)
    if form.kind == "whole":
        places = torch.einsum("kpx,lqy->klpqxy", along_x, _along(form.y))
    else:
        places = torch.einsum("kpx,lm->klpmx", along_x, torch.eye(form.y.kernel))
    return places.reshape(form.x.kernel * form.y.kernel, -1).to(dtype).contiguous()


def _along(side: Side) -> Tensor:
    """1 where an output position reads an input position at a tap: [taps, positions, size]."""
    ones = torch.zeros(side.kernel, side.positions, side.size)
    for tap in range(side.kernel):
        for position in range(side.positions):
            read = side.first(tap) + position * side.stride
            if 0 <= read < side.size:
                ones[tap, position, read] = 1
    return ones


def _pad(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Zeros before and after; negative numbers cut off."""
    return _pad_parts(x, 0, dim, [(before, after)])[0]


def _pad_parts(x: Tensor, cut: int, dim: int, pads: Sequence[tuple[int, int]]) -> list[Tensor]:
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


def _sum(parts: Sequence[Tensor]) -> Tensor:
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

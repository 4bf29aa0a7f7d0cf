"""Two-dimensional convolutions whose weights change from call to call, in forms that onnxruntime is fast with.

Onnxruntime's convolutions want constant weights: with others a depthwise one is a loop over tiny products, and there is
none for the gradient of a weight. Its matrix product and its transposition of a matrix are fast. So images are laid out
with the channels first and the samples last, [C, X, Y, B]; the long side is Y. There,

- a shift by a pixel along Y is one cut of long rows, and 1 x 1 convolutions are one product;
- a depthwise convolution is, for every channel, one product of a band matrix made from its weights with the image;
- a dense one is one product of the weights with the input shifted to every tap along Y, whose parts, one for each tap
  along X, are shifted and added;
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
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from edgetrain.export.lowering.onnx.convolution_form import Form, Side, add_up, choose, pad, pad_parts


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
    return add_up(pad_parts(product, 0, 1, [(-first, first + rest) for first in firsts]))


def _wide_gradients(
    form: Form, image: Tensor, kernel: Tensor, dy: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    (O, I), B = kernel.shape[:2], image.shape[3]
    # The output's gradient where the input is along X, for each tap.
    rest = form.x.size - form.x.positions
    moved = [pad(dy, 1, form.x.first(k), rest - form.x.first(k)) for k in range(form.x.kernel)]
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

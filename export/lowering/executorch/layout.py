"""Operators on images element by element, computed channels-last where an operand is at hand so.

Products make images channels-last, windows are gathered from such. Between them stand activations, normalisations and
their gradients: computed in the same layout, nothing is turned around from layer to layer. The row-major image is
offered to whoever wants it; if nobody does, it is dead code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from edgetrain.export.lowering.executorch.rewrite import Rewriter

aten = torch.ops.aten

ELEMENTWISE = frozenset(
    {
        aten.abs.default,
        aten.add.Scalar,
        aten.add.Tensor,
        aten.clamp.default,
        aten.div.Scalar,
        aten.div.Tensor,
        aten.elu.default,
        aten.exp.default,
        aten.gelu.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log.default,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.reciprocal.default,
        aten.relu.default,
        aten.rsqrt.default,
        aten.sigmoid.default,
        aten.sqrt.default,
        aten.sub.Scalar,
        aten.sub.Tensor,
        aten.tanh.default,
        torch.ops.quantized_decomposed.dequantize_per_tensor.default,
        torch.ops.quantized_decomposed.quantize_per_tensor.default,
    }
)


def elementwise(rewriter: Rewriter, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The current call on channels-last images, if an operand is one already and all others can be."""
    images = [value for node, value in zip(rewriter.node.args, args, strict=False) if rewriter.has_last(node)]
    if not images:
        return NotImplemented
    shape = max((image.shape for image in images), key=lambda s: s.numel())
    operands = []
    for index, value in enumerate(args):
        if not isinstance(value, Tensor) or value.numel() == 1:
            operands.append(value)
        elif value.shape == shape:
            operands.append(rewriter.last(index))
        elif value.ndim in (3, 4) and value.shape[-2:] == (1, 1):
            operands.append(value.reshape(-1, 1, 1, value.shape[-3]))
        else:
            return NotImplemented
    return rewriter.image(target(*operands, **kwargs))


def to_last(image: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C]."""
    return image.permute(0, 2, 3, 1).contiguous()


def from_last(image: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W]."""
    return image.permute(0, 3, 1, 2).contiguous()


def part_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Of which node's results this is one, and which."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        source, index = node.args
        if isinstance(source, fx.Node) and isinstance(index, int):
            return source, index
    return None

"""Scaled dot-product attention with a backward pass of few sweeps over the scores.

A score matrix is the largest tensor of a Transformer's step. Autograd on the plain formula scales queries and keys,
looks for rows that are masked whole by comparing and choosing, and needs the sum of dP * P for the softmax. Here
products take the scale along, rows without any key are zeroed in the output, which is smaller, and that sum is taken as
the one of dO * O (Dao et al. 2022, "FlashAttention", section 3.1), smaller too.

Shape letters: T target and S source positions, K width of a head; dimensions before are the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# exp(-60) = 9e-27: nothing beside a sum of at least 1, and far from denormal numbers, whose exponentials take
# onnxruntime's softmax ten times as long.
MASKED = 60.0
# Stands for a row's largest score if it has none.
_LOWEST = -1e30


class Attention(torch.autograd.Function):
    """`apply(query, key, value, mask, scale, checked)` gives the output and what the backward pass keeps.

    Args of `apply`:
        query: [N..., T, K].
        key: [N..., S, K].
        value: [N..., S, K'].
        mask: added to the scores, or None; -inf where attending is not allowed.
        scale: of the scores.
        checked: whether every row may attend to something.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, checked: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [N..., T, K'], probabilities [N..., T, S], and 1 for rows that attend to anything."""
        scores = _product(query, key, transpose_second=True, scale=scale)
        alive = torch.ones((), dtype=scores.dtype)
        if mask is not None:
            scores = scores + mask
            if not checked:
                largest = torch.amax(scores, -1)
                alive = (largest > _LOWEST).to(scores.dtype).unsqueeze(-1)
                scores = torch.maximum(scores, (torch.clamp(largest, min=_LOWEST) - MASKED).unsqueeze(-1))
        probabilities = torch.softmax(scores, -1)
        output = _product(probabilities, value)
        return output if checked else output * alive, probabilities, alive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what the backward pass reads."""
        query, key, value, mask, ctx.scale, ctx.checked = inputs
        ctx.mask_shape = None if mask is None else mask.shape
        ctx.save_for_backward(query, key, value, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients by query, key, value and mask."""
        if grad is None:
            return (None,) * 6
        query, key, value, output, probabilities, alive = ctx.saved_tensors
        if not ctx.checked:
            grad = grad * alive
        by_value = _product(probabilities, grad, transpose_first=True)
        by_probabilities = _product(grad, value, transpose_second=True)
        total = (grad * output).sum(-1, keepdim=True)
        by_scores = probabilities * (by_probabilities - total)
        by_query = _product(by_scores, key, scale=ctx.scale)
        by_key = _product(by_scores, query, transpose_first=True, scale=ctx.scale)
        by_mask = by_scores.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        return by_query, by_key, by_value, by_mask, None, None


def _product(
    first: Tensor, second: Tensor, *, transpose_first: bool = False, transpose_second: bool = False, scale: float = 1.0
) -> Tensor:
    """A matrix product over the same batch dimensions, as one over a single one, times a number.

    With a reshape between the transposition that splits the heads and the one of the matrices, onnxruntime makes the
    latter a part of its product; else it would make both transpositions one, of the whole tensor.
    """
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (first, second))
    a = a.transpose(1, 2) if transpose_first else a
    b = b.transpose(1, 2) if transpose_second else b
    product = torch.bmm(a, b)
    # Right behind it, so that it becomes a part of the product.
    product = product if scale == 1 else product * scale
    return product.reshape(*first.shape[:-2], a.shape[1], b.shape[2])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`F.scaled_dot_product_attention`; None for what is left to it.

    Rows that may attend to nothing give zeros, as there.
    """
    if dropout_p or enable_gqa or len({x.shape[:-2] for x in (query, key, value)}) > 1 or query.ndim < 3:
        return None
    mask = attn_mask
    if is_causal:
        T, S = query.shape[-2], key.shape[-2]
        mask = torch.full((T, S), -math.inf, dtype=query.dtype).triu(1)
    elif mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # In a causal row there is always the first position.
    output: Tensor = Attention.apply(query, key, value, mask, scale, is_causal or mask is None)[0]  # type: ignore[no-untyped-call]
    return output

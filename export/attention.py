"""Scaled dot-product attention with a backward pass of few sweeps over the scores.

A score matrix is the largest tensor of a Transformer's step. Autograd on the plain formula scales queries and keys,
looks for rows that are masked whole by comparing and choosing, and needs the sum of dP * P for the softmax. Here the
queries alone are scaled, rows without any key are zeroed in the output, which is smaller, and that sum is taken as the
one of dO * O (Dao et al. 2022, "FlashAttention", section 3.1), smaller too.

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
    """`apply(query, key, value, mask, scale)` gives the output and what the backward pass keeps.

    Args of `apply`:
        query: [..., T, K].
        key: [..., S, K].
        value: [..., S, K'].
        mask: added to the scores, or None; -inf where attending is not allowed.
        scale: of the scores.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, checked: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output [..., T, K'], scaled queries, probabilities [..., T, S], and 1 for rows that attend to anything."""
        scaled = query * scale
        scores = torch.matmul(scaled, key.transpose(-1, -2))
        alive = torch.ones((), dtype=scores.dtype)
        if mask is not None:
            scores = scores + mask
            largest = torch.amax(scores, -1, keepdim=True)
            if not checked:
                alive = (largest > _LOWEST).to(scores.dtype)
                largest = torch.clamp(largest, min=_LOWEST)
            scores = torch.maximum(scores, largest - MASKED)
        probabilities = torch.softmax(scores, -1)
        output = torch.matmul(probabilities, value)
        return output if checked else output * alive, scaled, probabilities, alive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what the backward pass reads."""
        _, key, value, mask, ctx.scale, ctx.checked = inputs
        ctx.mask_shape = None if mask is None else mask.shape
        ctx.save_for_backward(key, value, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients by query, key, value and mask."""
        if grad is None:
            return (None,) * 6
        key, value, output, scaled, probabilities, alive = ctx.saved_tensors
        if not ctx.checked:
            grad = grad * alive
        by_value = torch.matmul(probabilities.transpose(-1, -2), grad)
        by_probabilities = torch.matmul(grad, value.transpose(-1, -2))
        total = (grad * output).sum(-1, keepdim=True)
        by_scores = probabilities * (by_probabilities - total)
        by_query = torch.matmul(by_scores, key) * ctx.scale
        by_key = torch.matmul(by_scores.transpose(-1, -2), scaled)
        by_mask = by_scores.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
        return by_query, by_key, by_value, by_mask, None, None


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
    if dropout_p or enable_gqa or query.shape[:-2] != key.shape[:-2] != value.shape[:-2] or query.ndim < 3:
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

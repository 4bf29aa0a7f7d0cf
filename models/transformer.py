"""What the reference Transformers share: attention and blocks.

Shape letters: B batch, T target or only sequence, S source sequence, D width, H heads, K width per head.

Masks are float and added to the scores: 0 where attending is allowed, `MASKED` where not. `MASKED` is finite,
so a row in which nothing may be attended to (a sample that only pads a micro-batch) gives numbers, not NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# exp(-1e4) is 0 in float32, and -1e4 still fits float16.
MASKED = -1e4


def padding_mask(allowed_BS: torch.Tensor) -> torch.Tensor:
    """From "is this position real?" (any dtype, [B, S]) to an additive mask [B, 1, 1, S]."""
    return (1.0 - allowed_BS[:, None, None, :].to(torch.float32)) * MASKED


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_BTD: torch.Tensor,
        context_BSD: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
    ) -> torch.Tensor:
        """Attends from `x` to `context` (the same tensor for self-attention). Returns [B, T, D]."""
        q_BHTK = self._split(self.query(x_BTD))
        k_BHSK = self._split(self.key(context_BSD))
        v_BHSK = self._split(self.value(context_BSD))
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=causal)
        y: torch.Tensor = self.out(y_BHTK.transpose(1, 2).flatten(2))
        return y

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, GELU (in the tanh form of the original GPT-2 and BERT code), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, D] to […, D]."""
        y: torch.Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """Self-attention and feed-forward with residuals.

    Args:
        width: D.
        heads: H; divides `width`.
        norm_first: normalize before each part (GPT-2, ViT), else after each residual (Vaswani, BERT).
        cross: attend to a second sequence in between (a decoder that has an encoder).
    """

    def __init__(self, width: int, heads: int, *, norm_first: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads) if cross else None
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.feed_forward = FeedForward(width, 4 * width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BTD: torch.Tensor,
        mask: torch.Tensor | None = None,
        context_BSD: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
    ) -> torch.Tensor:
        """[B, T, D] to [B, T, D]. `mask` and `context_mask` broadcast to [B, H, T, T] and [B, H, T, S]."""
        x = x_BTD
        if self.norm_first:
            h = self.attention_norm(x)
            x = x + self.attention(h, h, mask, causal=causal)
        else:
            x = self.attention_norm(x + self.attention(x, x, mask, causal=causal))
        if self.cross is not None and self.cross_norm is not None:
            assert context_BSD is not None
            if self.norm_first:
                x = x + self.cross(self.cross_norm(x), context_BSD, context_mask)
            else:
                x = self.cross_norm(x + self.cross(x, context_BSD, context_mask))
        if self.norm_first:
            return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]
        return self.feed_forward_norm(x + self.feed_forward(x))  # type: ignore[no-any-return]


def init_transformer(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights and zero biases, as in BERT (Devlin et al. 2019) and GPT-2."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=std)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)

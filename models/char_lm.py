"""`char-lm`: a causal Transformer that predicts the next character, or the next word.

GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners") at 1/150 of its smallest
size: width 128, 4 layers of 4 heads, context 64, learned positions, normalization first.

| | |
|---|---|
| inputs | int64 [B, 64], characters in [0, 97) |
| outputs | logits, float32 [B, 64, 97] |
| targets | int64 [B, 64], -100 past the end of a text |
| parameters | 826,465 |
| data | `edgetrain.models.data.next_characters`, or `next_words` |

`level="word"` takes words in [0, 2000) instead, with 1,315,536 parameters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from edgetrain.models.data.text import NUM_CHARACTERS, next_characters, next_words
from edgetrain.models.errors import ModelError
from edgetrain.models.losses import token_cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch
from edgetrain.models.transformer import Block, init_transformer

NUM_WORDS = 2000


class CharLm(nn.Module):
    """Embedding, blocks, normalization, head."""

    def __init__(
        self,
        vocabulary: int = NUM_CHARACTERS,
        *,
        length: int = 64,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        init_transformer(self)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Tokens [B, T], T at most `length`, to logits [B, T, vocabulary]."""
        x_BTD = self.embedding(tokens_BT) + self.position[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD, causal=True)
        logits: torch.Tensor = self.head(self.norm(x_BTD))
        return logits


def char_lm(
    *,
    batch_size: int = 8,
    level: Literal["char", "word"] = "char",
    length: int = 64,
    width: int = 128,
    layers: int = 4,
) -> ModelSource:
    """The model with its loss per token and an example batch of text.

    Raises:
        ModelError: `level` is neither "char" nor "word".
    """
    if level not in ("char", "word"):
        raise ModelError(f"level is {level!r}; it must be 'char' or 'word'")
    if level == "char":
        data, vocabulary = next_characters(length=length), NUM_CHARACTERS
    else:
        data, vocabulary = next_words(length=length, vocabulary=NUM_WORDS), NUM_WORDS
    module = CharLm(vocabulary, length=length, width=width, layers=layers)
    return ModelSource(module, token_cross_entropy, example_batch(data.train, batch_size))

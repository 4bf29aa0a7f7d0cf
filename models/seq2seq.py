"""`seq2seq`: an encoder-decoder Transformer that spells numbers: 1042 -> one thousand forty two.

Vaswani et al. 2017, "Attention is all you need", small (width 64, 2 + 2 layers of 4 heads) and with
normalization first (Xiong et al. 2020), which plain SGD needs. Learned positions; the decoder's embedding is
also its output matrix (section 3.4 of the paper).

| | |
|---|---|
| inputs | (source int64 [B, 6], decoder input int64 [B, 10]); 0 is padding in both |
| outputs | logits, float32 [B, 10, 33] |
| targets | int64 [B, 10], -100 behind the end |
| parameters | 237,568 |
| data | `edgetrain.models.data.spelled_numbers`; `greedy_decode` spells without being shown the answer |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.models.data.numbers import MAX_DIGITS, MAX_WORDS, NUM_SYMBOLS, NUM_WORDS, PAD, spelled_numbers
from edgetrain.models.losses import token_cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch
from edgetrain.models.transformer import Block, init_transformer, padding_mask


class Seq2Seq(nn.Module):
    """Encoder and decoder.

    Padding of the source is masked in the encoder and in the decoder's cross-attention. Padding of the
    decoder input stands behind everything real, so the causal mask hides it already.
    """

    def __init__(self, *, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.source_embedding = nn.Embedding(NUM_SYMBOLS, width)
        self.source_position = nn.Parameter(torch.zeros(MAX_DIGITS, width))
        self.encoder = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.word_embedding = nn.Embedding(NUM_WORDS, width)
        self.word_position = nn.Parameter(torch.zeros(MAX_WORDS, width))
        self.decoder = nn.ModuleList(Block(width, heads, cross=True) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        init_transformer(self, std=width**-0.5)
        for position in (self.source_position, self.word_position):
            nn.init.normal_(position, std=width**-0.5)

    def forward(self, source_BS: torch.Tensor, words_BT: torch.Tensor) -> torch.Tensor:
        """Source [B, 6] and words so far [B, 10] to logits [B, 10, 33]."""
        mask = padding_mask(source_BS != PAD)
        x_BSD = self.source_embedding(source_BS) + self.source_position
        for block in self.encoder:
            x_BSD = block(x_BSD, mask)
        x_BSD = self.encoder_norm(x_BSD)
        y_BTD = self.word_embedding(words_BT) + self.word_position
        for block in self.decoder:
            y_BTD = block(y_BTD, None, x_BSD, mask, causal=True)
        return F.linear(self.decoder_norm(y_BTD), self.word_embedding.weight)


def seq2seq(*, batch_size: int = 8) -> ModelSource:
    """The model with its loss per word and an example batch of numbers."""
    return ModelSource(Seq2Seq(), token_cross_entropy, example_batch(spelled_numbers().train, batch_size))

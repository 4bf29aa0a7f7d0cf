"""`bert-tiny`: a bidirectional Transformer that classifies a text.

BERT-Tiny of Turc et al. 2019 ("Well-read students learn better"): 2 layers, width 128, 2 heads, after Devlin
et al. 2019, "BERT". Normalization after each residual and the pooler, tanh of a linear layer on the first
position, as there; a vocabulary of 2,000 words instead of 30,522 pieces and no segment embeddings (there is
one segment).

| | |
|---|---|
| inputs | {"input_ids": int64 [B, 128] in [0, 2000), "attention_mask": int64 [B, 128]} |
| outputs | logits, float32 [B, 8] |
| targets | int64 [B] |
| parameters | 686,728 |
| data | `edgetrain.models.data.topic_paragraphs` |
"""

from __future__ import annotations

import torch
from torch import nn

from edgetrain.models.data.text import topic_paragraphs
from edgetrain.models.losses import cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch
from edgetrain.models.transformer import Block, init_transformer, padding_mask


class BertTiny(nn.Module):
    """Embedding, blocks, pooler, head."""

    def __init__(
        self,
        vocabulary: int = 2000,
        num_classes: int = 8,
        *,
        length: int = 128,
        width: int = 128,
        layers: int = 2,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.embedding_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, norm_first=False) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)
        # BERT's 0.02 suits its width of 768; narrower, it leaves the first position deaf to the others.
        init_transformer(self, std=width**-0.5)
        nn.init.normal_(self.position, std=width**-0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Words and mask [B, T], T at most `length`, to logits [B, num_classes]."""
        mask = padding_mask(attention_mask)
        x_BTD = self.embedding_norm(self.embedding(input_ids) + self.position[: input_ids.shape[1]])
        for block in self.blocks:
            x_BTD = block(x_BTD, mask)
        logits: torch.Tensor = self.head(torch.tanh(self.pooler(x_BTD[:, 0])))
        return logits


def bert_tiny(*, batch_size: int = 8) -> ModelSource:
    """The model with its loss and an example batch of paragraphs."""
    return ModelSource(BertTiny(), cross_entropy, example_batch(topic_paragraphs().train, batch_size))

"""Models with a frozen part, small enough to export in a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MICRO_BATCH = 4


def frozen_cnn(seed: int = 5):
    """Convolutions, then two linear layers; `last:2` leaves all convolutions to the trunk, [B, 12] crosses."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(32, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    module[1].running_mean.uniform_(-0.2, 0.2)
    module[1].running_var.uniform_(0.5, 2)
    return module, nn.CrossEntropyLoss(reduction="none"), cnn_data(MICRO_BATCH)


def cnn_data(count: int, seed: int = 6):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 2, 12, 12, generator=generator)
    return inputs, (inputs.mean((1, 2, 3)) * 20).long().clamp(-1, 1) + 1


class MaskedText(nn.Module):
    """Token ids and a mask that both halves of the model read."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 64)
        self.first = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True, dropout=0.0)
        self.second = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, norm_first=True, dropout=0.0)
        self.head = nn.Linear(64, 5)

    def forward(self, ids, mask):
        hidden = mask == 0
        x = self.first(self.embedding(ids), src_key_padding_mask=hidden)
        return self.head(self.second(x, src_key_padding_mask=hidden).mean(1))


def frozen_text(seed: int = 7):
    torch.manual_seed(seed)
    mask = torch.ones(MICRO_BATCH, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    inputs = {"ids": torch.randint(0, 30, (MICRO_BATCH, 6)), "mask": mask}
    return MaskedText(), lambda o, t: F.cross_entropy(o, t, reduction="none"), (inputs, torch.arange(MICRO_BATCH))

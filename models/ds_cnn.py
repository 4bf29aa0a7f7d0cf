"""`ds-cnn`: keyword spotting with depthwise-separable convolutions, as in MLPerf Tiny.

DS-CNN of Zhang et al. 2017, "Hello Edge: Keyword spotting on microcontrollers", in the size that MLPerf Tiny
uses (Banbury et al. 2021): a 10x4 convolution with stride 2 and four depthwise-separable blocks, all of 64
channels. Convolutions before a BatchNorm have no bias, and there is no dropout.

| | |
|---|---|
| inputs | MFCC, float32 [B, 1, 49, 10] |
| outputs | logits, float32 [B, 12] |
| targets | int64 [B] |
| parameters | 23,180 |
| data | `edgetrain.models.data.keywords` |
"""

from __future__ import annotations

import torch
from torch import nn

from edgetrain.models.data.audio import keywords
from edgetrain.models.losses import cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch


class SeparableBlock(nn.Module):
    """Depthwise 3x3, then pointwise 1x1, each with BatchNorm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to the same shape."""
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        return torch.relu(self.pointwise_norm(self.pointwise(x)))


class DsCnn(nn.Module):
    """Stem, four separable blocks, mean, head."""

    def __init__(self, num_classes: int = 12, *, channels: int = 64) -> None:
        super().__init__()
        # 49x10 to 25x5.
        self.stem = nn.Conv2d(1, channels, (10, 4), stride=2, padding=(5, 1), bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(SeparableBlock(channels) for _ in range(4)))
        self.head = nn.Linear(channels, num_classes)

    def forward(self, mfcc: torch.Tensor) -> torch.Tensor:
        """MFCC [B, 1, 49, 10] to logits [B, num_classes]."""
        x = self.blocks(torch.relu(self.stem_norm(self.stem(mfcc))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def ds_cnn(*, batch_size: int = 8) -> ModelSource:
    """The model with its loss and an example batch of sounds."""
    data = keywords(num_train=max(batch_size, 1), num_test=0)
    return ModelSource(DsCnn(), cross_entropy, example_batch(data.train, batch_size))

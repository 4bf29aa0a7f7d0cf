"""`resnet-8`: the image classifier of MLPerf Tiny.

Banbury et al. 2021, "MLPerf Tiny Benchmark"; residual blocks after He et al. 2016. Three stages of one block
with 16, 32 and 64 channels, the last two at stride 2 with a 1x1 convolution as shortcut. Convolutions before
a BatchNorm have no bias here, which changes nothing but the count (the original's 78 k includes such biases
and the running statistics).

| | |
|---|---|
| inputs | float32 [B, 3, 32, 32] |
| outputs | logits, float32 [B, 10] |
| targets | int64 [B] |
| parameters | 77,946 |
| data | `edgetrain.models.data.shapes` |
"""

from __future__ import annotations

import torch
from torch import nn

from edgetrain.models.data.images import shapes
from edgetrain.models.losses import cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Resnet8(nn.Module):
    """Stem, three residual blocks, mean, head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2))
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, 32, 32] to logits [B, num_classes]."""
        x = self.blocks(torch.relu(self.stem_norm(self.stem(images))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def resnet_8(*, batch_size: int = 8) -> ModelSource:
    """The model with its loss and an example batch of shapes."""
    data = shapes(num_train=max(batch_size, 1), num_test=0)
    return ModelSource(Resnet8(), cross_entropy, example_batch(data.train, batch_size))

"""`mobilenet-v2`: inverted residuals with linear bottlenecks.

Sandler et al. 2018, "MobileNetV2", table 2; the head has at least 1,280 channels whatever the width. The
reference is width 0.35 at 128x128 with ten classes. It takes any image size that is a multiple of 32.

| | |
|---|---|
| inputs | float32 [B, 3, 128, 128] |
| outputs | logits, float32 [B, 10] |
| targets | int64 [B] |
| parameters | 408,938 |
| data | `edgetrain.models.data.rgb_digits(size=128)` |
"""

from __future__ import annotations

import torch
from torch import nn

from edgetrain.models.data.images import rgb_digits
from edgetrain.models.errors import ModelError
from edgetrain.models.losses import cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch

# Expansion, output channels, blocks, stride of the first block: the paper's t, c, n, s.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def scaled(channels: int, width: float) -> int:
    """`channels * width` to the nearest multiple of 8, at least 8, and no more than a tenth below."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out)]


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; a residual where the shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        expand = [*_convolution(channels_in, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        depthwise = [*_convolution(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *_convolution(hidden, channels_out, 1))
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, C', H / stride, W / stride]."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Stem, seventeen inverted residuals, a last convolution, mean, head."""

    def __init__(self, num_classes: int = 10, *, width: float = 0.35) -> None:
        super().__init__()
        channels = scaled(32, width)
        layers: list[nn.Module] = [*_convolution(3, channels, 3, 2), nn.ReLU6()]
        for expansion, base, repeats, stride in STAGES:
            for index in range(repeats):
                channels_out = scaled(base, width)
                block_stride = stride if index == 0 else 1
                layers.append(InvertedResidual(channels, channels_out, stride=block_stride, expansion=expansion))
                channels = channels_out
        last = scaled(1280, max(1.0, width))
        self.features = nn.Sequential(*layers, *_convolution(channels, last, 1), nn.ReLU6())
        self.head = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] to logits [B, num_classes]."""
        logits: torch.Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


def mobilenet_v2(*, batch_size: int = 8, width: float = 0.35, image_size: int = 128) -> ModelSource:
    """The model with its loss and an example batch of coloured digits.

    Args:
        batch_size: samples in the example batch.
        width: the width multiplier, e.g. 0.35, 0.5, 1.0.
        image_size: pixels a side, a multiple of 32.

    Raises:
        ModelError: `width` is not positive, or `image_size` no multiple of 32.
    """
    if not 0 < width <= 4:
        raise ModelError(f"width is {width}; it must be above 0 and at most 4")
    if image_size < 32 or image_size % 32:
        raise ModelError(f"image_size is {image_size}; it must be a multiple of 32")
    data = rgb_digits(size=image_size, num_train=max(batch_size, 1), num_test=1)
    return ModelSource(MobileNetV2(width=width), cross_entropy, example_batch(data.train, batch_size))

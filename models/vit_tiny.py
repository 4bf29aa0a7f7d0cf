"""`vit-tiny`: a Vision Transformer for small images.

Dosovitskiy et al. 2021, "An image is worth 16x16 words", with the mean over patches instead of a class token
(Beyer et al. 2022, "Better plain ViT baselines"). The sizes follow the image: at 32x32 a patch of 8x8
gives 16 tokens that each see a stroke; patches of 4x4 see a dot, cost four times the time and learn more
slowly. Width 64 and 4 layers of 4 heads keep a training step in reach of a Raspberry Pi. (ViT-Ti of Touvron
et al. 2021, width 192 with 12 layers and 5.5 million parameters, is 26 times as large.)

| | |
|---|---|
| inputs | float32 [B, 3, 32, 32] |
| outputs | logits, float32 [B, 10] |
| targets | int64 [B] |
| parameters | 214,090 |
| data | `edgetrain.models.data.rgb_digits` |
"""

from __future__ import annotations

import torch
from torch import nn

from edgetrain.models.data.images import rgb_digits
from edgetrain.models.losses import cross_entropy
from edgetrain.models.registry import ModelSource
from edgetrain.models.tensors import example_batch
from edgetrain.models.transformer import Block, init_transformer


class VitTiny(nn.Module):
    """Patches, blocks, mean, head."""

    def __init__(
        self,
        num_classes: int = 10,
        *,
        image_size: int = 32,
        patch: int = 8,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros((image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        init_transformer(self, std=width**-0.5)
        # Scales at which plain SGD starts moving at once.
        nn.init.normal_(self.patches.weight, std=(3 * patch * patch) ** -0.5)
        nn.init.normal_(self.position, std=0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, 32, 32] to logits [B, num_classes]."""
        x_BTD = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: torch.Tensor = self.head(self.norm(x_BTD).mean(1))
        return logits


def vit_tiny(*, batch_size: int = 8) -> ModelSource:
    """The model with its loss and an example batch of coloured digits."""
    return ModelSource(VitTiny(), cross_entropy, example_batch(rgb_digits().train, batch_size))

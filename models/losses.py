"""Losses: one number per sample, or per token. The exported graph weighs and adds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgetrain.models.data.samples import IGNORE_INDEX


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy per sample.

    Args:
        outputs: logits, float [B, C].
        targets: classes, int64 [B].

    Returns:
        float [B], in nats.
    """
    return F.cross_entropy(outputs, targets, reduction="none")


def token_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy per token.

    Args:
        outputs: logits, float [B, T, V].
        targets: tokens, int64 [B, T]; `IGNORE_INDEX` (-100) where there is nothing to predict. Give those
            weight 0 (`edgetrain.models.data.token_weights`), or a mean counts them as loss 0.

    Returns:
        float [B, T], in nats; 0 at `IGNORE_INDEX`.
    """
    losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return losses.view_as(targets)

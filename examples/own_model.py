"""A model of your own: a function that returns (module, loss, example batch).

edgetrain export examples/own_model.py:make --trainable last:2 -o own.edge
edgetrain export examples/own_model.py:make --set hidden=128 -o wide.edge
"""

import torch
from torch import nn


class Recognizer(nn.Module):
    """Recognizes which of six gestures a wrist made, from 3 axes x 64 samples of an accelerometer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(3, 32, 5, padding=2),
            nn.ReLU(),
            nn.AvgPool1d(2),
            nn.Conv1d(32, hidden, 5, padding=2),
            nn.GELU(),
            nn.AvgPool1d(2),
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 6)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        pooled = self.features(signal).mean(dim=2)
        return self.head(self.norm(pooled))


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One loss per sample: no reduction, the bundle weighs and sums."""
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def make(hidden: int = 64):
    torch.manual_seed(0)
    batch = (torch.randn(16, 3, 64), torch.randint(0, 6, (16,)))
    return Recognizer(hidden), loss, batch

"""A small bundle with per-sample clipping, exported for real: a perceptron of 66 parameters."""

from __future__ import annotations

import sys

import torch
from torch import nn

from edgetrain.export import export_bundle


def make_module() -> nn.Module:
    """5 inputs, 7 hidden units, 3 classes; the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def write(path: str) -> None:
    """Exports it for onnxruntime and torch, micro-batch 8."""
    torch.manual_seed(1)
    data = torch.randn(8, 5), torch.randint(0, 3, (8,))
    loss = nn.CrossEntropyLoss(reduction="none")
    export_bundle(make_module(), loss, data, runtimes=("onnxruntime", "torch"), per_sample_clipping=True, out=path)


if __name__ == "__main__":
    write(sys.argv[1])

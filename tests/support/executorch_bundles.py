"""Small bundles for executorch, exported once per test run: lowering takes seconds."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

from edgetrain.export import Storage, export_bundle
from edgetrain.models.losses import cross_entropy, token_cross_entropy
from edgetrain.models.transformer import Block, init_transformer
from support.frozen import cnn_data, frozen_cnn


class SmallCnn(nn.Module):
    """Every kind of convolution and norm that our CNNs have, and an overlapping max pool."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)
        self.stem_norm.running_mean.normal_()
        self.stem_norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
        x = nn.functional.relu6(self.group_norm(self.depthwise(x)))
        x = torch.nn.functional.gelu(self.pointwise(x))
        return self.head(x.mean((2, 3)))


class SmallTransformer(nn.Module):
    """A causal language model of one block; its embedding and the head learn too."""

    def __init__(self, vocabulary=11, width=16, length=6):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.block = Block(width, 2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        init_transformer(self)

    def forward(self, tokens):
        x = self.block(self.embedding(tokens) + self.position, causal=True)
        return self.head(self.norm(x))


def cnn_problem(seed=0, size=4):
    torch.manual_seed(seed)
    return SmallCnn(), cross_entropy, (torch.randn(size, 2, 12, 12), torch.randint(5, (size,)))


def transformer_problem(seed=0, size=3):
    torch.manual_seed(seed)
    tokens = torch.randint(11, (size, 7))
    return SmallTransformer(), token_cross_entropy, (tokens[:, :-1].clone(), tokens[:, 1:].clone())


@cache
def cnn_bundle() -> Path:
    return _export("cnn", *cnn_problem())


@cache
def transformer_bundle() -> Path:
    return _export("transformer", *transformer_problem())


@cache
def split_bundle() -> Path:
    """A frozen CNN with two linear layers that learn, in parts; with a program for TrainingModule."""
    return _export("split", *frozen_cnn(), trainable="last:2", executorch_style="training-module")


@cache
def int8_bundle() -> Path:
    """The same with its trunk in integers."""
    storage = Storage(kind="int8-static", calibration=cnn_data(22, seed=9))
    return _export("int8", *frozen_cnn(), trainable="last:2", storage=storage)


def _export(name, module, loss, batch, **options) -> Path:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="edgetrain-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return export_bundle(module, loss, batch, runtimes=("executorch",), out=folder / name, name=name, **options)

"""What translating leaves out to be quicker changes no operator of a graph."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

from onnx import load_model_from_string  # noqa: E402
from torch import nn  # noqa: E402

from edgetrain.export import export_bundle  # noqa: E402
from edgetrain.export.lowering.onnx import lowering  # noqa: E402
from edgetrain.models.losses import cross_entropy  # noqa: E402
from edgetrain.protocol.bundle import Bundle  # noqa: E402


class Halves(nn.Module):
    """Slices for the rule about them, casts and sums that other rules are about, and views."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.layer(x)
        left, right = x[..., :2], x[..., 2:]
        return self.head((torch.relu(left).mT @ right + 0).flatten(1))


def operators(path):
    bundle = Bundle(path)
    graphs = bundle.manifest.program("onnxruntime").graphs
    models = {name: load_model_from_string(bundle.read(graph.file)) for name, graph in graphs.items()}
    return {name: [node.op_type for node in model.graph.node] for name, model in models.items()}


def test_graphs_have_the_same_operators(tmp_path, monkeypatch):
    torch.manual_seed(0)
    problem = (Halves(), cross_entropy, (torch.randn(4, 2, 4, 4), torch.randint(3, (4,))))
    export_bundle(*problem, out=tmp_path / "quick", runtimes=("onnxruntime",))
    monkeypatch.setattr(lowering, "quicker", contextlib.nullcontext)
    export_bundle(*problem, out=tmp_path / "slow", runtimes=("onnxruntime",))
    assert operators(tmp_path / "quick") == operators(tmp_path / "slow")
    assert "Reshape" in operators(tmp_path / "quick")["step"]

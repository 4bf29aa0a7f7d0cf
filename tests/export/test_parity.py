"""The proof of the gradients: what it refuses, and the one thing that it passes over."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from edgetrain.export import export_bundle
from edgetrain.export.errors import GradientError
from edgetrain.export.lowering.onnx import OnnxLowering

SAMPLES = 200


class Threshold(nn.Module):
    """relu(weight - x), with one sample right on the kink at the initial weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return torch.relu(self.weight - x)


def export(tmp_path, on_kink=1):
    x = torch.linspace(-1, 1, SAMPLES)[:, None]
    x[:on_kink] = 1.5
    batch = (x, torch.zeros(SAMPLES, 1))
    return export_bundle(Threshold(), lambda y, t: (y - t).sum(1), batch, out=tmp_path / "t.edge", split=False)


@pytest.fixture
def tampered(monkeypatch):
    """What onnxruntime computes goes through a function of (run, arrays)."""
    load = OnnxLowering.load

    def by(tamper):
        def tampered_load(self, lowered):
            run = load(self, lowered)
            return lambda arrays: tamper(run, arrays)

        monkeypatch.setattr(OnnxLowering, "load", tampered_load)

    return by


def shifted(run, arrays):
    """As a machine that rounds differently: the weight is off by one unit in the last place."""
    return run([np.nextafter(arrays[0], np.float32(2)), *arrays[1:]])


def test_a_kink_under_a_point_is_no_error(tampered, tmp_path, caplog):
    tampered(shifted)
    with caplog.at_level(logging.WARNING):
        assert export(tmp_path).exists()
    assert "as on the kink of a relu" in caplog.text


def test_more_than_a_kink_is_refused(tampered, tmp_path):
    tampered(shifted)
    # Five samples of the 171 that count: more than rounding explains.
    with pytest.raises(GradientError, match=r"gradient of 'weight' differs from eager torch by 3.0e-02"):
        export(tmp_path, on_kink=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.0002, 0.995, np.nan])
def test_a_gradient_that_is_a_little_wrong_is_refused(tampered, tmp_path, factor):
    def scaled(run, arrays):
        return [array * np.float32(factor) if array.shape == (1,) else array for array in run(arrays)]

    tampered(scaled)
    with pytest.raises(GradientError, match="gradient of 'weight' differs from eager torch"):
        export(tmp_path)
    assert not list(tmp_path.iterdir())

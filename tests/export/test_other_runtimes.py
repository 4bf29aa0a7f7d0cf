"""Exports for the runtimes torch and ort-training. Their numbers are tested with the runtimes themselves."""

import pytest
import torch
from torch import nn

from edgetrain.export import UnsupportedError, export_bundle
from edgetrain.export.lowering import get_lowering
from edgetrain.export.lowering.ort_training import PYTHON_VARIABLE
from edgetrain.protocol.bundle import Bundle

LOSS = nn.CrossEntropyLoss(reduction="none")
HERE = [name for name in ("torch", "ort-training") if get_lowering(name).available() is None]
needs_ort_training = pytest.mark.skipif("ort-training" not in HERE, reason="needs .venv-ort-training")


class Net(nn.Module):
    """Has a parameter that the loss does not depend on, and a normalization by groups."""

    def __init__(self, cumulative: bool = False) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 2)
        self.first = nn.Linear(4, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Linear(8, 3)
        self.cumulative = cumulative

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x.cumsum(1) if self.cumulative else x
        return self.second(torch.relu(self.norm(x)))


def example():
    torch.manual_seed(0)
    return Net(), LOSS, (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("runtime", HERE)
def test_same_input_same_bytes(tmp_path, runtime):
    first = export_bundle(*example(), runtimes=[runtime], out=tmp_path / "a.edge")
    second = export_bundle(*example(), runtimes=[runtime], out=tmp_path / "b.edge")
    assert first.read_bytes() == second.read_bytes()


def test_one_export_writes_every_runtime(tmp_path):
    runtimes = ["onnxruntime", *HERE]
    bundle = Bundle(export_bundle(*example(), runtimes=runtimes, out=tmp_path / "all"))
    bundle.verify_files()
    assert [program.runtime for program in bundle.manifest.programs] == runtimes
    for runtime in runtimes:
        own = {entry.file.split("/")[0] for entry in bundle.manifest.files(runtime) if "/" in entry.file}
        assert own == {runtime}


def test_an_exported_program_of_torch_holds_no_parameters(tmp_path):
    bundle = Bundle(export_bundle(*example(), runtimes=["torch"], out=tmp_path / "b"))
    data = bundle.read(bundle.manifest.program("torch").graphs["step"].file)
    first = example()[0].first.weight.detach().numpy().tobytes()
    assert first in bundle.read(bundle.manifest.initial_parameters)
    assert first not in data


@needs_ort_training
def test_what_onnxruntime_cannot_differentiate_is_refused(tmp_path):
    _, loss, batch = example()
    with pytest.raises(UnsupportedError, match=r"onnxruntime-training cannot generate.*gradient"):
        export_bundle(Net(cumulative=True), loss, batch, runtimes=["ort-training"], out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@needs_ort_training
def test_layer_norms_that_are_frozen_and_alike_are_two(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    batch = (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    export_bundle(net, LOSS, batch, trainable="0.weight", runtimes=["ort-training"], out=tmp_path / "b")


def test_without_the_second_environment_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(UnsupportedError, match=r"'ort-training': .*onnxruntime-training-cpu==1\.19\.2"):
        export_bundle(*example(), runtimes=["ort-training"], out=tmp_path / "b")

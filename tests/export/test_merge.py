"""Ordinary models back from trained parameters."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgetrain.export import MergeError, export_bundle, merge
from support.bundles import manifest_of

SELECTION = "lora:r=2,target=fc1;sparse:fraction=0.5,target=conv;fc2"


class Network(nn.Module):
    def __init__(self, seed=6):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc1, self.fc2 = nn.Linear(36, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(torch.relu(self.norm(self.conv(x))).flatten(1))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("merge")
    data = torch.randn(4, 1, 5, 5), torch.arange(4) % 3
    path = export_bundle(Network(), nn.CrossEntropyLoss(reduction="none"), data, trainable=SELECTION, out=folder / "b")
    vector = np.random.default_rng(1).normal(0, 0.3, manifest_of(path).num_parameters).astype(np.float32)
    return path, vector


def by_hand(path, vector):
    """The user's module with the trained tensors put in: slices, low-rank changes, whole tensors."""
    named = {
        e.name: torch.from_numpy(vector[e.offset : e.offset + e.numel].reshape(e.shape))
        for e in manifest_of(path).parameters
    }
    module = Network().eval()
    with torch.no_grad():
        module.conv.weight[:2] = named["conv.weight"]
        module.fc1.weight += 2.0 * named["fc1.lora_B"] @ named["fc1.lora_A"]
        module.fc2.weight.copy_(named["fc2.weight"])
        module.fc2.bias.copy_(named["fc2.bias"])
    return module


def test_onnx_takes_only_the_inputs_and_has_no_adapter_left(trained, tmp_path):
    path, vector = trained
    out = merge(path, vector, tmp_path / "model.onnx")
    model = onnx.load(out)
    assert [value.name for value in model.graph.input] == ["inputs"]
    ops = [node.op_type for node in model.graph.node]
    assert sum(op in ("Gemm", "MatMul") for op in ops) == 2
    x = torch.randn(4, 1, 5, 5)
    got = onnxruntime.InferenceSession(out).run(None, {"inputs": x.numpy()})[0]
    np.testing.assert_allclose(got, by_hand(path, vector)(x).detach(), rtol=1e-4, atol=1e-5)


def test_pt_is_the_users_state_dict(trained, tmp_path):
    path, vector = trained
    out = merge(path, vector, tmp_path / "model.pt", module=Network())
    module = Network(seed=9)
    module.load_state_dict(torch.load(out))
    x = torch.randn(4, 1, 5, 5)
    torch.testing.assert_close(module.eval()(x), by_hand(path, vector)(x))


def test_parameters_from_files(trained, tmp_path):
    from safetensors.numpy import save_file

    path, vector = trained
    np.save(tmp_path / "p.npy", vector)
    vector.tofile(tmp_path / "p.f32")
    tensors = {e.name: vector[e.offset : e.offset + e.numel].reshape(e.shape) for e in manifest_of(path).parameters}
    save_file(tensors, tmp_path / "p.safetensors")
    outputs = {
        merge(path, tmp_path / f"p.{end}", tmp_path / f"{end}.onnx").read_bytes()
        for end in ("npy", "f32", "safetensors")
    }
    assert len(outputs) == 1
    del tensors["fc2.bias"]
    save_file(tensors, tmp_path / "q.safetensors")
    with pytest.raises(MergeError, match=r"'fc2\.bias' is missing"):
        merge(path, tmp_path / "q.safetensors", tmp_path / "q.onnx")


def test_wrong_parameters_modules_and_formats_are_refused(trained, tmp_path):
    path, vector = trained
    with pytest.raises(MergeError, match=r"shape \[3\]"):
        merge(path, vector[:3], tmp_path / "m.onnx")
    with pytest.raises(MergeError, match="NaN"):
        merge(path, np.full_like(vector, np.nan), tmp_path / "m.onnx")
    with pytest.raises(MergeError, match="cannot be read"):
        merge(path, tmp_path / "missing.npy", tmp_path / "m.onnx")
    with pytest.raises(MergeError, match=r"not \.tflite"):
        merge(path, vector, tmp_path / "m.tflite")
    with pytest.raises(MergeError, match="needs the module"):
        merge(path, vector, tmp_path / "m.pt")
    with pytest.raises(MergeError, match="frozen weights"):
        merge(path, vector, tmp_path / "m.pt", module=Network(seed=8))
    assert not list(tmp_path.iterdir())

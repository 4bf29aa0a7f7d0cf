"""Token weights, ignored targets, custom metrics, and the step with per-sample clipping."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.export import BatchError, export_bundle
from edgetrain.protocol.bundle import Bundle
from support.bundles import flat_parameters, manifest_of, run_graph

LOSS = nn.CrossEntropyLoss(reduction="none")


def tagger():
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 4))


def tag_loss(outputs, targets):
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=-1)


def test_ignored_tokens_weigh_nothing(tmp_path):
    ids, tags = torch.randint(9, (2, 5)), torch.tensor([[0, 1, 2, -1, -1], [3, 2, -1, -1, -1]])
    path = export_bundle(tagger(), tag_loss, (ids, tags), ignore_index=-1, out=tmp_path / "b")
    assert manifest_of(path).batch.weights.shape == (2, 5)
    module = tagger()
    vector = flat_parameters(module, manifest_of(path))
    got = run_graph(path, "step", vector, (ids, tags), np.ones((2, 5), np.float32))
    outputs = module(ids)
    # torch's own mean over the five tokens that count.
    mean = F.cross_entropy(outputs.transpose(1, 2), tags, ignore_index=-1)
    mean.backward()
    assert got["weight_sum"] == 5
    np.testing.assert_allclose(got["loss_sum"] / got["weight_sum"], mean.detach(), rtol=1e-5)
    np.testing.assert_allclose(got["gradients.2.weight"] / 5, module[2].weight.grad, rtol=1e-4, atol=1e-6)
    right = (outputs.argmax(-1) == tags) & (tags >= 0)
    assert got["metrics.correct"] == right.sum()


def test_the_loss_of_torch_brings_its_ignore_index(tmp_path):
    loss = nn.CrossEntropyLoss(reduction="none", ignore_index=3)
    data = torch.randn(4, 5), torch.tensor([0, 3, 1, 3])
    path = export_bundle(nn.Sequential(nn.Linear(5, 4)), loss, data, out=tmp_path / "b")
    module = nn.Linear(5, 4)
    vector = np.concatenate([module.weight.detach().numpy().ravel(), module.bias.detach().numpy()])
    assert run_graph(path, "eval", vector, data, np.ones(4, np.float32))["weight_sum"] == 2


def test_ignore_index_needs_targets_that_line_up():
    with pytest.raises(BatchError, match="ignore_index=0 needs"):
        export_bundle(nn.Linear(2, 2), lambda o, t: (o - t).square().mean(1), (torch.ones(1, 2),
                      torch.ones(1, 2)), ignore_index=0, out="unused")  # fmt: skip


def test_custom_metrics(tmp_path):
    data = torch.randn(3, 4), torch.randn(3, 2)
    metrics = {"absolute": lambda o, t: (o - t).abs().sum(1), "each": lambda o, t: (o - t).square()}
    path = export_bundle(
        nn.Linear(4, 2), lambda o, t: (o - t).square().sum(1), data, metrics=metrics, out=tmp_path / "b"
    )
    module = nn.Linear(4, 2)
    vector = np.concatenate([module.weight.detach().numpy().ravel(), module.bias.detach().numpy()])
    weights = np.array([1, 0, 2], np.float32)
    got = run_graph(path, "eval", vector, data, weights)
    difference = (module(data[0]) - data[1]).detach().numpy()
    np.testing.assert_allclose(got["metrics.absolute"], weights @ np.abs(difference).sum(1), rtol=1e-5)
    np.testing.assert_allclose(got["metrics.each"], weights @ difference**2, rtol=1e-5)
    with pytest.raises(BatchError, match="metric 'mean'"):
        export_bundle(nn.Linear(4, 2), lambda o, t: (o - t).square().sum(1), data,
                      metrics={"mean": lambda o, t: (o - t).mean()}, out=tmp_path / "c")  # fmt: skip


def test_per_sample_clipping_matches_a_loop_over_samples(tmp_path):
    torch.manual_seed(4)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.GroupNorm(2, 4),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    data = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    path = export_bundle(module, LOSS, data, per_sample_clipping=True, out=tmp_path / "b")
    weights = np.array([1, 1, 0.5, 1, 0], np.float32)
    gradients = []
    for x, y, weight in zip(*data, weights, strict=True):
        module.zero_grad()
        (LOSS(module(x[None]), y[None]).sum() * float(weight)).backward()
        gradients.append(torch.cat([p.grad.ravel() for p in module.parameters()]).numpy().copy())
    norms = np.linalg.norm(gradients, axis=1)
    clip = np.float32(np.median(norms))
    wanted = sum(g * min(1, clip / n) for g, n in zip(gradients, norms, strict=True) if n > 0)

    manifest = manifest_of(path)
    graph = manifest.programs[0].graphs["step_per_sample_clipped"]
    assert [spec.name for spec in graph.inputs][-2:] == ["weights", "clip_norm"]
    session = onnxruntime.InferenceSession(Bundle(path).read(graph.file))
    feeds = {f"parameters.{n}": p.detach().numpy() for n, p in module.named_parameters()}
    feeds |= {
        "inputs": data[0].numpy(),
        "targets": data[1].numpy(),
        "weights": weights,
        "clip_norm": np.asarray(clip),
    }
    got = dict(zip([spec.name for spec in graph.outputs], session.run(None, feeds), strict=True))
    np.testing.assert_allclose(got["norms"], norms, rtol=1e-4)
    flat = np.concatenate([got[f"gradients.{e.name}"].ravel() for e in manifest.parameters])
    np.testing.assert_allclose(flat, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
    assert got["weight_sum"] == 3.5

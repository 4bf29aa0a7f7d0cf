"""Runs bundles straight in onnxruntime, and the same step in eager torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import Manifest


def leaves_of(half):
    if isinstance(half, torch.Tensor):
        return [half]
    return list(half.values()) if isinstance(half, dict) else list(half)


def run_graph(path: Path, graph: str, vector: np.ndarray, batch, weights) -> dict[str, np.ndarray]:
    """Feeds a graph as a device would: parameters from the flat vector, leaves by name, weights."""
    bundle = Bundle(path)
    manifest = bundle.manifest
    spec = manifest.program("onnxruntime").graphs[graph]
    session = onnxruntime.InferenceSession(bundle.read(spec.file), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [s.name for s in spec.inputs]
    assert [value.name for value in session.get_outputs()] == [s.name for s in spec.outputs]
    feeds = {}
    for entry, tensor in zip(manifest.parameters, spec.inputs, strict=False):
        feeds[tensor.name] = entry.of(vector)
    named = {leaf.name: leaf for half in (manifest.batch.inputs, manifest.batch.targets) for leaf in half.leaves}
    values = dict(zip(named, [t.numpy() for half in batch for t in leaves_of(half)], strict=True))
    for tensor in spec.inputs[len(manifest.parameters) :]:
        feeds[tensor.name] = np.asarray(weights) if tensor.name == "weights" else values[tensor.name]
    outputs = session.run(None, feeds)
    return dict(zip([s.name for s in spec.outputs], outputs, strict=True))


def self_test_batch(path: Path):
    """The leaves and weights of the self-test, by name."""
    bundle = Bundle(path)
    batch = bundle.manifest.batch
    data = bundle.read(bundle.manifest.self_test.file)
    values, at = {}, 0
    for spec in (*batch.inputs.leaves, *batch.targets.leaves, batch.weights):
        values[spec.name] = np.frombuffer(data, spec.dtype, spec.numel, at).reshape(spec.shape)
        at += spec.nbytes
    assert at == len(data)
    return values


def node_counts(path: Path, graph: str = "step") -> dict[str, int]:
    """How often each ONNX operator occurs."""
    bundle = Bundle(path)
    model = onnx.load_from_string(bundle.read(bundle.manifest.program("onnxruntime").graphs[graph].file))
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def manifest_of(path: Path) -> Manifest:
    return Bundle(path).manifest


def eager_step(module, loss, batch, weights, names=None):
    """Loss sum and gradients of the user's own module in evaluation mode, by autograd."""
    module.eval()
    inputs, targets = batch
    module.zero_grad(set_to_none=True)
    if isinstance(inputs, torch.Tensor):
        outputs = module(inputs)
    elif isinstance(inputs, dict):
        outputs = module(**inputs)
    else:
        outputs = module(*inputs)
    total = (loss(outputs, targets) * torch.as_tensor(weights)).sum()
    total.backward()
    grads = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy().copy()
        for name, p in module.named_parameters()
        if names is None or name in names
    }
    return float(total.detach()), grads


def flat_parameters(module, manifest: Manifest) -> np.ndarray:
    state = dict(module.named_parameters())
    return np.concatenate([state[e.name].detach().numpy().ravel() for e in manifest.parameters])


def assert_step_matches(path: Path, module, loss, batch, weights, *, rtol=1e-4, floor=1e-6):
    """The bundle's step against eager torch, on data and weights that the exporter has not seen."""
    manifest = manifest_of(path)
    got = run_graph(path, "step", flat_parameters(module, manifest), batch, weights)
    total, grads = eager_step(module, loss, batch, weights)
    np.testing.assert_allclose(got["loss_sum"], total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["weight_sum"], np.sum(weights), rtol=1e-6)
    largest = max(np.abs(grads[e.name]).max() for e in manifest.parameters)
    for entry in manifest.parameters:
        want = grads[entry.name]
        error = np.abs(got[f"gradients.{entry.name}"] - want).max()
        assert error <= rtol * np.abs(want).max() + floor * largest, (entry.name, error, np.abs(want).max())
    return got

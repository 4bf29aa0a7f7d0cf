"""Bundles from the real exporter, with what eager torch computes: the same yardstick in every environment.

    python tests/support/exported.py FOLDER

writes one folder per case, each with `bundle.edge`, `data.npz` (local data as a client has it) and
`reference.npz`. Environments without torch run their tests on what another one has written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetrain.edge_client.training.schedules import learning_rate_factor
from edgetrain.edge_client.training.trainer import batches, count_steps
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import ScheduleConfig, TrainingConfig

MICRO_BATCH = 4
SAMPLES = 22
# A batch that is no multiple of the micro-batch, in data that is no multiple of the batch.
CONFIG = TrainingConfig(
    epochs=4,
    batch_size=10,
    learning_rate=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-3,
    max_grad_norm=0.5,
    schedule=ScheduleConfig(name="cosine", warmup_steps=3),
)
SEED = 11
CASES = ("cnn", "cnn-last", "text")
# Not executorch: it has tests of its own, and three such exports take it more than a minute.
RUNTIMES = ("onnxruntime", "torch", "ort-training")


@dataclass(frozen=True)
class Case:
    """What a test gets."""

    bundle: Path
    data: Path
    # One batch of 3 samples (`batch.*`, `batch.weights`) and what eager gives for it (`step.*`, `infer`), the
    # trained parameters and the mean loss of each step (`trained`, `losses`).
    reference: dict[str, np.ndarray]

    def batch(self, manifest):
        halves = {}
        for name, structure in (("inputs", manifest.batch.inputs), ("targets", manifest.batch.targets)):
            arrays = [self.reference[f"batch.{leaf.name}"] for leaf in structure.leaves]
            keys = [leaf.name.removeprefix(f"{name}.") for leaf in structure.leaves]
            if structure.kind == "dict":
                halves[name] = dict(zip(keys, arrays, strict=True))
            else:
                halves[name] = arrays[0] if structure.kind == "array" else tuple(arrays)
        return (halves["inputs"], halves["targets"]), self.reference["batch.weights"]


def read_case(folder: Path, name: str) -> Case:
    with np.load(folder / name / "reference.npz") as loaded:
        return Case(folder / name / "bundle.edge", folder / name / "data.npz", dict(loaded))


def build(folder: Path) -> None:
    """Exports every case for every runtime that can be exported here."""
    import torch

    from edgetrain.export import export_bundle
    from edgetrain.export.lowering import get_lowering

    torch.set_num_threads(1)
    runtimes = [name for name in RUNTIMES if get_lowering(name).available() is None]
    for name in CASES:
        module, loss, inputs, targets, weights = _text() if name == "text" else _cnn()
        trainable = "last:2" if name == "cnn-last" else "all"
        take = _slicer(MICRO_BATCH)
        out = folder / name
        export_bundle(
            module,
            loss,
            (take(inputs), take(targets)),
            trainable=trainable,
            runtimes=runtimes,
            out=out / "bundle.edge",
            name=name,
        )
        manifest = Bundle(out / "bundle.edge").manifest
        leaves = _named("inputs", inputs) | _named("targets", targets)
        arrays = {key: leaf.numpy() for key, leaf in leaves.items()}
        np.savez(out / "data.npz", **arrays, weights=weights.numpy())
        reference = _reference(module, loss, inputs, targets, weights, manifest)
        first = {f"batch.{key}": array[:3] for key, array in arrays.items()}
        np.savez(out / "reference.npz", **first, **{"batch.weights": weights.numpy()[:3]}, **reference)


def _cnn():
    """Depthwise and strided convolutions, group and batch norm, ReLU6, pooling; weights per sample."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4),
    )  # fmt: skip
    module[5].running_mean.uniform_(-0.2, 0.2)
    module[5].running_var.uniform_(0.5, 2)
    inputs = torch.randn(SAMPLES, 2, 10, 10)
    targets = inputs.mean((2, 3)).sum(1).mul(20).long().clamp(-2, 1) + 2
    return module, nn.CrossEntropyLoss(reduction="none"), inputs, targets, torch.rand(SAMPLES) + 0.1


def _text():
    """A Transformer block: embedding, attention with a mask, layer norm; dict inputs, losses per token."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.norm = nn.LayerNorm(16)
            self.project = nn.Linear(16, 48)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            self.head = nn.Linear(16, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids, mask):
            x = self.embedding(ids)
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.project(self.norm(x)).chunk(3, -1))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :] > 0)
            x = x + attended.transpose(1, 2).flatten(2)
            return self.head(x + self.down(F.gelu(self.up(x))))

    def loss(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    torch.manual_seed(4)
    ids = torch.randint(0, 20, (SAMPLES, 7))
    lengths = torch.randint(2, 8, (SAMPLES, 1))
    mask = (torch.arange(7) < lengths).long()
    return Text(), loss, {"ids": ids, "mask": mask}, (ids * 3 + 1) % 20, mask.float()


def _reference(module, loss, inputs, targets, weights, manifest):
    """One step, and a whole training by torch.optim.SGD on whole batches."""
    import torch

    module.eval()
    named = dict(module.named_parameters())
    trained = [named[entry.name] for entry in manifest.parameters]

    def forward(take):
        part = take(inputs)
        outputs = module(**part) if isinstance(part, dict) else module(part)
        losses = loss(outputs, take(targets))
        w = take(weights)
        return outputs, (losses * w).sum(), w.sum()

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()

    outputs, loss_sum, weight_sum = forward(_slicer(3))
    gradients = torch.autograd.grad(loss_sum, trained)
    found = {
        "step.loss_sum": loss_sum.detach().numpy(),
        "step.weight_sum": weight_sum.numpy(),
        "step.gradients": flat(gradients),
        "infer": outputs.detach().numpy(),
    }
    optimizer = torch.optim.SGD(
        trained,
        lr=CONFIG.learning_rate,
        momentum=CONFIG.momentum,
        nesterov=CONFIG.nesterov,
        weight_decay=CONFIG.weight_decay,
    )
    history = []
    for step, indices in enumerate(batches(SAMPLES, CONFIG, SEED)):
        _, loss_sum, weight_sum = forward(_picker(torch.from_numpy(indices)))
        optimizer.zero_grad()
        (loss_sum / weight_sum).backward()
        torch.nn.utils.clip_grad_norm_(trained, CONFIG.max_grad_norm)
        factor = learning_rate_factor(CONFIG.schedule, step, count_steps(SAMPLES, CONFIG))
        optimizer.param_groups[0]["lr"] = CONFIG.learning_rate * factor
        optimizer.step()
        history.append(float(loss_sum.detach() / weight_sum))
    return found | {"trained": flat(trained), "losses": np.array(history)}


def _picker(indices):
    def take(half):
        if isinstance(half, dict):
            return {key: leaf[indices] for key, leaf in half.items()}
        return half[indices]

    return take


def _slicer(count):
    return _picker(slice(0, count))


def _named(name, half):
    if isinstance(half, dict):
        return {f"{name}.{key}": leaf for key, leaf in half.items()}
    return {name: half}


if __name__ == "__main__":
    build(Path(sys.argv[1]))

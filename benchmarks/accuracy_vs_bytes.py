"""What compression costs: accuracy after R rounds against the bytes that went up.

    python benchmarks/accuracy_vs_bytes.py [--quick]

Two tasks on data that is not identically distributed, through the real trainer, codecs and FedAvg:

- char-lm: a causal Transformer predicts the next character; every client holds one topic of Python's own help
  texts (65 clients of different sizes and subjects);
- mobilenet: inverted residuals (Sandler et al. 2018) with GroupNorm instead of BatchNorm, as Hsieh et al. 2020
  found necessary for skewed labels, on real digits split by a Dirichlet distribution with alpha 0.3.

Each codec runs with and without error feedback, from the same parameters, with the same clients and batches.
Writes benchmarks/results/accuracy_vs_bytes.json and .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgetrain.edge_client import open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.export import export_bundle
from edgetrain.models import get_model
from edgetrain.models.data import digits, dirichlet_split, take, token_weights
from edgetrain.models.data.text import next_characters, topics
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
from edgetrain.simulation import SimulationConfig, simulate

RESULTS = Path(__file__).parent / "results"
CODECS = (
    "dense|float32",
    "dense|int8:block=256",
    "topk:0.1|int8:block=256|rice",
    "topk:0.05|int8:block=256|rice",
    "topk:0.01|int8:block=256|rice",
    "topk:0.001|int8:block=256|rice",
)
SEED = 3


@dataclass(frozen=True)
class Task:
    name: str
    bundle: Bundle
    shards: list[Dataset]
    test: Dataset
    rounds: int
    clients_per_round: int
    training: TrainingConfig


class Inverted(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; a residual where the shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.residual = stride == 1 and channels_in == channels_out
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, hidden, 1, bias=False), nn.GroupNorm(8, hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.GroupNorm(8, hidden), nn.ReLU6(),
            nn.Conv2d(hidden, channels_out, 1, bias=False), nn.GroupNorm(8, channels_out),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_task(quick: bool) -> Task:
    torch.manual_seed(SEED)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.GroupNorm(8, 16), nn.ReLU6(),
        Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 40, 2), Inverted(40, 40, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip
    train, test = digits()
    batch = (torch.from_numpy(train.inputs[:16]), torch.from_numpy(train.targets[:16]))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    shards = [
        Dataset(part.inputs, part.targets)
        for indices in dirichlet_split(train.targets, 20, 0.3, SEED, min_per_client=10)
        for part in [take(train, indices)]
    ]
    return Task(
        "mobilenet",
        export(module, loss, batch),
        shards,
        Dataset(test.inputs, test.targets),
        rounds=10 if quick else 100,
        clients_per_round=8,
        training=TrainingConfig(epochs=2, batch_size=16, learning_rate=0.1, momentum=0.5, max_grad_norm=5.0),
    )


def char_lm_task(quick: bool) -> Task:
    length = 32
    source = get_model("char-lm", length=length, width=64, layers=2, batch_size=16, seed=SEED)

    def shard(title: str, part: str) -> Dataset:
        samples = getattr(next_characters(length=length, titles=[title]), part)
        return Dataset(
            samples.inputs, np.where(samples.targets < 0, 0, samples.targets), token_weights(samples.targets)
        )

    titles = [title for title, text in topics().items() if len(text) > 2000]
    tests = [shard(title, "test") for title in titles]
    test = Dataset(
        np.concatenate([t.inputs for t in tests]),
        np.concatenate([t.targets for t in tests]),
        np.concatenate([t.weights for t in tests]),
    )
    return Task(
        "char-lm",
        export(*source),
        [shard(title, "train") for title in titles],
        test,
        rounds=5 if quick else 40,
        clients_per_round=8,
        training=TrainingConfig(
            epochs=1, max_steps=8, batch_size=16, learning_rate=0.5, momentum=0.9, max_grad_norm=1.0
        ),
    )


def export(module, loss, batch) -> Bundle:
    directory = tempfile.mkdtemp(prefix="edgetrain-bench-")
    return Bundle(export_bundle(module, loss, batch, out=Path(directory) / "bundle.edge"))


def run(task: Task) -> list[dict[str, object]]:
    session = open_session(task.bundle, threads=1)
    rows = []
    for codec in CODECS:
        for feedback in (True, False):
            if codec == "dense|float32" and not feedback:
                continue
            config = SimulationConfig(
                rounds=task.rounds, clients_per_round=task.clients_per_round, training=task.training, codec=codec,
                error_feedback=feedback, seed=SEED, evaluate_every=max(1, task.rounds // 12),
            )  # fmt: skip
            start = time.perf_counter()
            curve, total = [], 0
            for result in simulate(session, task.bundle.initial_parameters(), task.shards, task.test, config):
                total += result.bytes_up
                if result.accuracy is not None:
                    curve.append(
                        {
                            "round": result.round,
                            "accuracy": result.accuracy,
                            "loss": result.loss,
                            "bytes_up": total,
                        }
                    )
            updates = task.rounds * task.clients_per_round
            rows.append({
                "task": task.name, "codec": codec, "error_feedback": feedback,
                "accuracy": float(np.mean([point["accuracy"] for point in curve[-3:]])), "loss": curve[-1]["loss"],
                "bytes_per_parameter": total / updates / task.bundle.manifest.num_parameters,
                "bytes_up": total, "curve": curve,
            })  # fmt: skip
            row = rows[-1]
            print(
                f"{task.name:10} {codec:32} {'feedback' if feedback else 'without ':8} accuracy {row['accuracy']:.4f} "
                f"({100 * (row['accuracy'] - rows[0]['accuracy']):+.2f} points) "
                f"{row['bytes_per_parameter']:.4f} B/param  "
                f"{4 / row['bytes_per_parameter']:.0f}x  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return rows


def plot(rows: list[dict[str, object]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted({row["task"] for row in rows})
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4.5), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for row in rows:
            if row["task"] == name:
                color = f"C{CODECS.index(row['codec'])}"
                axis.plot(
                    [point["bytes_up"] / 1e6 for point in row["curve"]],
                    [100 * point["accuracy"] for point in row["curve"]],
                    color=color, linestyle="-" if row["error_feedback"] else ":",
                    label=row["codec"].split("|rice")[0] if row["error_feedback"] else None,
                )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("MB up, all clients")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(f"{name} (dotted: without error feedback)")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run?")
    parser.add_argument("--task", choices=("char-lm", "mobilenet"), action="append")
    arguments = parser.parse_args()
    tasks = {"mobilenet": mobilenet_task, "char-lm": char_lm_task}
    wanted = arguments.task or list(tasks)
    rows = [row for name in wanted for row in run(tasks[name](arguments.quick))]
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        out = RESULTS / "accuracy_vs_bytes.json"
        # Tasks can be run one at a time.
        old = json.loads(out.read_text()) if out.exists() else []
        rows = [row for row in old if row["task"] not in wanted] + rows
        out.write_text(json.dumps(rows, indent=1) + "\n")
        plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()

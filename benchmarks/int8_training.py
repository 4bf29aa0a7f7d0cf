"""Training with weights in int8 against float32: what is learnt, and what it takes.

    python benchmarks/int8_training.py

Accuracy: digits-cnn from its random start, over some seeds; the same steps, learning rate and batches in float32, in
int8 with quantization-aware scaling, and in int8 without it (gradients multiplied by the square of the scale before
the trainer sees them). Memory: the peak resident set of a fresh process that trains a perceptron with 6.3 million
parameters, and the time of a step in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from step_time import machine, peak_megabytes  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MICRO_BATCH = 32
STEPS = 20


@dataclass(frozen=True)
class AccuracyRow:
    weights: str
    # Of 360 held-out digits, over the seeds: mean, and the lowest.
    accuracy: float
    lowest: float
    parameter_bytes: int


@dataclass(frozen=True)
class MemoryRow:
    weights: str
    parameter_bytes: int
    bundle_bytes: int
    # After loading, before the first step.
    loaded_mb: float
    peak_mb: float
    # Of one optimizer step.
    milliseconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train_wide(arguments.train)))
        return
    with tempfile.TemporaryDirectory() as name:
        learnt = accuracies(Path(name), arguments.seeds, arguments.epochs)
        print_table(learnt)
        taken = [memory(Path(name), kind) for kind in ("float32", "int8")]
        print_table(taken)
    record = {
        "machine": machine(),
        "accuracy": [asdict(row) for row in learnt],
        "memory": [asdict(row) for row in taken],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "int8_training.json").write_text(json.dumps(record, indent=2) + "\n")


def accuracies(folder: Path, seeds: int, epochs: int) -> list[AccuracyRow]:
    from edgetrain.edge_client import open_session
    from edgetrain.edge_client.training.dataset import Dataset
    from edgetrain.edge_client.training.trainer import evaluate, train
    from edgetrain.export import Storage, export_bundle
    from edgetrain.models import get_model
    from edgetrain.models.data import digits
    from edgetrain.protocol.bundle import Bundle
    from edgetrain.protocol.training import TrainingConfig

    data, test = (Dataset(part.inputs, part.targets) for part in digits())
    training = TrainingConfig(epochs=epochs, batch_size=MICRO_BATCH, learning_rate=0.1)
    source = get_model("digits-cnn", batch_size=MICRO_BATCH)
    rows = []
    for name, kind in (("float32", "float32"), ("int8", "int8"), ("int8 without scaling", "int8")):
        storage = Storage(trainable=kind, max_loss_change=0.1)
        bundle = Bundle(export_bundle(*source, out=folder / name.replace(" ", "-"), storage=storage))
        session: Any = open_session(bundle)
        learner = Unscaled(session) if name.endswith("scaling") else session
        found = []
        for seed in range(seeds):
            result = train(learner, bundle.initial_parameters(), data, training, seed=seed)
            found.append(float(evaluate(session, result.parameters, test).metrics["correct"]))
        size = bundle.manifest.initial_parameters.size
        rows.append(AccuracyRow(name, round(statistics.fmean(found), 4), round(min(found), 4), size))
    return rows


class Unscaled:
    """A session whose gradients are those of a plain step on the integers."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.manifest = session.manifest

    def step(self, parameters: Any, batch: Any, weights: Any) -> Any:
        result = self._session.step(parameters, batch, weights)
        entries = [entry for entry in self.manifest.parameters if entry.dtype == "int8"]
        scales = parameters.graph_inputs()[len(self.manifest.parameters) :]
        for entry, scale in zip(entries, scales, strict=True):
            part = entry.of(result.gradients)
            part *= scale.reshape(-1, *[1] * (part.ndim - 1)) ** 2
        return result


def memory(folder: Path, kind: str) -> MemoryRow:
    import torch
    from torch import nn

    from edgetrain.export import Storage, export_bundle
    from edgetrain.protocol.bundle import Bundle

    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Linear(1024, 10))
    batch = torch.randn(8, 1024), torch.arange(8)
    loss = nn.CrossEntropyLoss(reduction="none")
    path = export_bundle(module, loss, batch, out=folder / f"wide-{kind}", storage=Storage(trainable=kind))
    manifest = Bundle(path).manifest
    command = [sys.executable, __file__, "--train", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        for _ in range(3)
    ]
    return MemoryRow(
        weights=kind,
        parameter_bytes=manifest.initial_parameters.size,
        bundle_bytes=sum(entry.size for entry in manifest.files()),
        **{key: round(statistics.median(each[key] for each in found), 1) for key in found[0]},
    )


def train_wide(path: Path) -> dict[str, float]:
    from edgetrain.edge_client import open_session
    from edgetrain.edge_client.training.dataset import Dataset
    from edgetrain.edge_client.training.trainer import train
    from edgetrain.protocol.bundle import Bundle
    from edgetrain.protocol.training import TrainingConfig

    bundle = Bundle(path)
    session = open_session(bundle)
    start = bundle.initial_parameters()
    loaded = peak_megabytes()
    data = Dataset(np.zeros((64, 1024), np.float32) + 0.1, np.zeros(64, np.int64))
    training = TrainingConfig(batch_size=8, max_steps=STEPS, epochs=STEPS, learning_rate=0.01)
    times: list[float] = []
    train(session, start, data, training, seed=0, on_step=lambda _: times.append(time.perf_counter()))
    return {
        "loaded_mb": loaded,
        "peak_mb": peak_megabytes(),
        "milliseconds": 1000 * float(np.median(np.diff(times))),
    }


def print_table(rows: list[Any]) -> None:
    names = list(asdict(rows[0]))
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(map(str, asdict(row).values())) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()

"""What privacy costs: time of a private step, and accuracy against epsilon.

    python benchmarks/privacy.py [--quick] [--part cost] [--part samples] [--part clients]

- cost: an optimizer step of DP-SGD (clipping by sample, noise) against the plain step of the same batch, in turns, on
  one thread; and noise alone for a million parameters, against numpy's own generator, which is neither
  cryptographically strong nor safe against floating-point attacks.
- samples: digits-cnn and a small char-lm trained with DP-SGD on one device, for several epsilon, against the same
  training without noise and clipping ("inf").
- clients: a linear classifier of digits (650 parameters: the noise grows with their number) over 100 clients with
  DP-FedAvg, each drawn for every round with probability 1/2.

Writes benchmarks/results/privacy.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgetrain.edge_client import open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.edge_client.training.private_steps import PrivateSteps, planned_release
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.export import export_bundle
from edgetrain.models import get_model
from edgetrain.models.data import digits, token_weights
from edgetrain.models.data.text import next_characters, topics
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.privacy import Keystream, Release, discrete_gaussian, rounded_gaussian, skellam
from edgetrain.protocol.privacy.calibrate import noise_multiplier_for
from edgetrain.protocol.training import SamplePrivacy, ScheduleConfig, TrainingConfig
from edgetrain.simulation import SimulationConfig, simulate

RESULTS = Path(__file__).parent / "results" / "privacy.json"
DELTA = 1e-5
SEED = 5


def make(name: str, micro_batch: int) -> tuple[Bundle, Dataset, Dataset]:
    """A bundle with per-sample clipping, and its data: (bundle, train, test)."""
    torch.set_num_threads(1)
    if name == "digits-cnn":
        source = get_model("digits-cnn", batch_size=micro_batch, seed=SEED)
        train_set, test_set = (Dataset(part.inputs, part.targets) for part in digits())
    else:
        source = get_model("char-lm", length=32, width=64, layers=2, batch_size=micro_batch, seed=SEED)
        titles = [title for title, text in topics().items() if len(text) > 2000]
        samples = next_characters(length=32, titles=titles)
        train_set, test_set = (
            Dataset(part.inputs, np.where(part.targets < 0, 0, part.targets), token_weights(part.targets))
            for part in (samples.train, samples.test)
        )
    path = Path(tempfile.mkdtemp(prefix="edgetrain-bench-")) / "bundle"
    return Bundle(export_bundle(*source, out=path, per_sample_clipping=True)), train_set, test_set


# --- cost --------------------------------------------------------------------------------------------


def cost(quick: bool) -> list[dict[str, Any]]:
    cases = (("digits-cnn", 32), ("digits-cnn", 256), ("char-lm", 32), ("char-lm", 256))
    return [cost_of(name, batch_size, 10 if quick else 60) for name, batch_size in cases]


def cost_of(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
    bundle, data, _ = make(name, 32)
    session = open_session(bundle, threads=1)
    privacy = SamplePrivacy(noise_multiplier=1.0)
    steps = PrivateSteps(session, TrainingConfig(batch_size=batch_size, privacy=privacy), privacy)
    parameters = bundle.initial_parameters()
    chunks = [np.arange(start, start + 32) for start in range(0, batch_size, 32)]

    def plain() -> None:
        total = np.zeros_like(parameters)
        for chunk in chunks:
            total += session.step(parameters, *data.take(chunk)).gradients
        total /= np.float32(batch_size)

    def clipped() -> Any:
        total = np.zeros_like(parameters)
        for chunk in chunks:
            total += steps.step(parameters, data, chunk).gradients
        return total

    def private() -> None:
        steps.mean_gradient(clipped(), len(data))

    times = in_turns({"plain": plain, "clipped": clipped, "private": private}, repeats)
    row = {
        "model": name, "parameters": len(parameters), "batch_size": batch_size,
        **{f"{key}_ms": 1e3 * value for key, value in times.items()},
        "clipping_ratio": times["clipped"] / times["plain"], "ratio": times["private"] / times["plain"],
    }  # fmt: skip
    print(f"{name}, batch {batch_size}, {len(parameters)} parameters: plain {row['plain_ms']:.2f} ms, "
          f"private {row['private_ms']:.2f} ms: {row['ratio']:.2f}x (clipping alone {row['clipping_ratio']:.2f}x)",
          flush=True)  # fmt: skip
    return row


def noise_cost(quick: bool) -> dict[str, float]:
    size = 1_000_000
    stream = Keystream()
    generator = np.random.default_rng(0)
    contenders = {
        "numpy normal (no protection)": lambda: generator.normal(0, 2.0**30, size),
        "rounded gaussian": lambda: rounded_gaussian(2.0**30)(stream, size),
        "discrete gaussian": lambda: discrete_gaussian(2.0**30)(stream, size),
        "discrete gaussian, deviation 100": lambda: discrete_gaussian(100.0)(stream, size),
        "skellam, deviation 100": lambda: skellam(100.0)(stream, size),
    }
    times = in_turns(contenders, 2 if quick else 9)
    for name, seconds in times.items():
        print(f"1M of {name}: {1e3 * seconds:.0f} ms")
    return times


def in_turns(contenders: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each on one thread; they take turns, so that what the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 2):
        for name, run in contenders.items():
            start = time.thread_time()
            run()
            if repeat >= 2:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# --- accuracy ----------------------------------------------------------------------------------------

SAMPLE_TASKS = {
    "digits-cnn": (
        TrainingConfig(epochs=30, batch_size=256, learning_rate=2.0, schedule=ScheduleConfig(name="linear")),
        (1.0, 2.0, 4.0, 8.0),
        0.5,
    ),
    "char-lm": (
        TrainingConfig(
            epochs=3, batch_size=512, learning_rate=1.0, momentum=0.9, schedule=ScheduleConfig(name="linear")
        ),
        (2.0, 8.0),
        0.3,
    ),
}  # fmt: skip


def samples(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, (task, epsilons, clip_norm) in SAMPLE_TASKS.items():
        bundle, data, test = make(name, 32)
        session = open_session(bundle, threads=1)
        for epsilon in (*epsilons, None):
            private = config = msgspec.structs.replace(task, max_steps=3 if quick else 0)
            if epsilon:
                noise = noise_for(epsilon, len(data), config, clip_norm)
                private = msgspec.structs.replace(
                    config, privacy=SamplePrivacy(clip_norm=clip_norm, noise_multiplier=noise)
                )
            else:
                # Without clipping, gradients are as long as they are: the usual step.
                private = msgspec.structs.replace(config, learning_rate=config.learning_rate / 5, max_grad_norm=1.0)
            start = time.perf_counter()
            result = train(session, bundle.initial_parameters(), data, private, seed=SEED)
            summary = evaluate(session, result.parameters, test)
            rows.append({
                "model": name, "examples": len(data), "epsilon": epsilon, "delta": DELTA, "steps": result.steps,
                "noise_multiplier": private.privacy.noise_multiplier if private.privacy else 0.0,
                "accuracy": float(summary.metrics["correct"]), "loss": summary.loss,
                "seconds": time.perf_counter() - start,
            })  # fmt: skip
            row = rows[-1]
            print(f"{name}, {len(data)} samples, {result.steps} steps, epsilon {epsilon or 'inf'}: noise "
                  f"{row['noise_multiplier']:.2f}, accuracy {row['accuracy']:.2%}, loss {row['loss']:.3f}, "
                  f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
    return rows


def noise_for(epsilon: float, examples: int, config: TrainingConfig, clip_norm: float) -> float:
    def releases(noise: float) -> list[Release]:
        privacy = SamplePrivacy(clip_norm=clip_norm, noise_multiplier=noise)
        return [planned_release(examples, msgspec.structs.replace(config, privacy=privacy))]

    return noise_multiplier_for(epsilon, DELTA, releases)


def clients(quick: bool) -> list[dict[str, Any]]:
    train_set, test_set = digits()
    data, test = (Dataset(part.inputs.reshape(len(part.inputs), 64), part.targets) for part in (train_set, test_set))
    batch = torch.from_numpy(data.inputs[:8]), torch.from_numpy(data.targets[:8])
    path = Path(tempfile.mkdtemp(prefix="edgetrain-bench-")) / "bundle"
    torch.manual_seed(SEED)
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    bundle = Bundle(export_bundle(torch.nn.Linear(64, 10), loss, batch, out=path))
    session = open_session(bundle, threads=1)
    order = np.random.default_rng(SEED).permutation(len(data))
    shards = [data.subset(part) for part in np.array_split(order, 100)]
    rounds, rows = (2 if quick else 40), []
    for epsilon in (4.0, 8.0, 16.0, None):
        strategy: Any = {"name": "fedavg", "weighted": False}
        if epsilon:
            noise = noise_multiplier_for(
                epsilon, 1e-3,
                lambda noise: [Release(mechanism="gaussian", noise_multiplier=noise, sampling="poisson",
                                       sampling_rate=0.5, steps=rounds)],
            )  # fmt: skip
            strategy = {"name": "dp-fedavg", "clip_norm": 0.5, "noise_multiplier": noise, "clients_per_round": 50,
                        "sampling": "poisson", "population": 100}  # fmt: skip
        config = SimulationConfig(
            rounds=rounds, clients_per_round=50, strategy=strategy, seed=SEED, evaluate_every=max(1, rounds // 4),
            training=TrainingConfig(epochs=2, batch_size=8, learning_rate=0.05),
        )  # fmt: skip
        *_, last = simulate(session, bundle.initial_parameters(), shards, test, config)
        rows.append({"clients": 100, "rounds": rounds, "epsilon": epsilon, "delta": 1e-3, "accuracy": last.accuracy,
                     "loss": last.loss})  # fmt: skip
        print(f"digits over 100 clients, {rounds} rounds, epsilon {epsilon or 'inf'}: {last.accuracy:.2%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each: does it run?")
    parser.add_argument("--part", choices=("cost", "samples", "clients"), action="append")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in arguments.part or ("cost", "samples", "clients"):
        if part == "cost":
            results["cost"], results["noise_1M_seconds"] = cost(arguments.quick), noise_cost(arguments.quick)
        else:
            results[part] = {"samples": samples, "clients": clients}[part](arguments.quick)
        if not arguments.quick:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

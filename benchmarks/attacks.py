"""Robustness: 20 % of the clients lie; accuracy per attack and strategy on non-IID digits.

    python benchmarks/attacks.py [--rounds 20] [--clients 20] [--alphas 1.0 0.3] [--out benchmarks/results]

Every update goes through the real trainer, codec and strategy (`edgetrain.simulation`); what an attacker
sends is encoded like everyone's. Prints a table and writes attacks.json. One thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgetrain.edge_client.runtimes import Session, open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.models.data import digits, dirichlet_split, take
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import CodecSpec, encode
from edgetrain.protocol.training import TrainingConfig
from edgetrain.simulation import LocalResult, SimulationConfig, Tamper, simulate

CODEC = "dense|int8:block=256"
SHARE = 0.2
TRAINING = TrainingConfig(epochs=2, batch_size=32, learning_rate=0.1, momentum=0.5)
STRATEGIES: dict[str, Any] = {
    "fedavg": "fedavg",
    "median": "median",
    "trimmed-mean": {"name": "trimmed-mean", "byzantine": SHARE},
    "krum": {"name": "krum", "byzantine": SHARE},
    "multi-krum": {"name": "multi-krum", "byzantine": SHARE},
    "bulyan": {"name": "bulyan", "byzantine": SHARE},
    "geometric-median": "geometric-median",
    "norm-bound(fedavg)": {"name": "norm-bound", "max_norm": 1.0},
    "norm-bound(trimmed-mean)": {
        "name": "norm-bound",
        "max_norm": 1.0,
        "inner": {"name": "trimmed-mean", "byzantine": SHARE},
    },
}

Deltas = list[np.ndarray]
Sent = Sequence[np.ndarray | bytes]
Attack = Callable[[np.random.Generator, Deltas, Deltas], Sent]
"""`attack(generator, attackers' own honest deltas, everyone else's) -> what the attackers send`."""


def sign_flip(_generator: np.random.Generator, own: Deltas, _others: Deltas) -> Sent:
    """The way back, four times as far."""
    return [-4 * delta for delta in own]


def scaled(_generator: np.random.Generator, own: Deltas, _others: Deltas) -> Sent:
    """Their own delta, thirty times."""
    return [30 * delta for delta in own]


def not_finite(_generator: np.random.Generator, own: Deltas, _others: Deltas) -> Sent:
    """NaN and infinity, which an honest encoder would refuse to write."""
    poisoned = []
    for number, delta in enumerate(own):
        payload = bytearray(encode(delta, CodecSpec.parse("dense|float32")))
        payload[-4:] = np.float32(np.nan if number % 2 else np.inf).tobytes()
        poisoned.append(bytes(payload))
    return poisoned


def random_noise(generator: np.random.Generator, own: Deltas, _others: Deltas) -> Sent:
    """Noise a hundred times as long as an honest delta."""
    length = np.mean([np.linalg.norm(delta) for delta in own])
    noise = [generator.normal(size=delta.shape) for delta in own]
    return [(100 * length * vector / np.linalg.norm(vector)).astype(np.float32) for vector in noise]


def a_little_is_enough(_generator: np.random.Generator, own: Deltas, others: Deltas) -> Sent:
    """Baruch et al., NeurIPS 2019: all attackers send mean - z * deviation, which hides among the honest.

    z = 1.5, more than the paper's formula gives for so few clients, and with the honest updates known.
    """
    honest = np.array(others)
    return [(honest.mean(axis=0) - 1.5 * honest.std(axis=0)).astype(np.float32)] * len(own)


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign-flip": sign_flip,
    "scaled": scaled,
    "label-flip": None,
    "nan-inf": not_finite,
    "random": random_noise,
    "a-little-is-enough": a_little_is_enough,
}


def tamper_with(attack: Attack, attackers: set[str], seed: int) -> Tamper:
    """The simulation's hook for an attack."""
    codec = CodecSpec.parse(CODEC)

    def tamper(number: int, results: Mapping[str, LocalResult]) -> Mapping[str, LocalResult]:
        lying = [name for name in results if name in attackers]
        others = [result.target for name, result in results.items() if name not in attackers]
        own = [results[name].target for name in lying]
        # When an attack has won, nobody can train any more.
        sent = attack(np.random.default_rng((seed, number)), own, others) if own and others else own
        changed = dict(results)
        for index, (name, what) in enumerate(zip(lying, sent, strict=True)):
            if isinstance(what, bytes):
                changed[name] = replace(results[name], update=what)
            else:
                update = encode(what, codec, seed=index)
                changed[name] = replace(results[name], update=update, target=what)
        return changed

    return tamper


def run(
    session: Session,
    start: np.ndarray,
    shards: list[Dataset],
    test: Dataset,
    strategy: Any,
    attack: str,
    rounds: int,
) -> dict[str, Any]:
    """The accuracy at the end (mean of the last three rounds) and what was refused."""
    count = len(shards)
    lying = sorted(np.random.default_rng(1).permutation(count)[: round(SHARE * count)].tolist())
    attackers = {f"client-{number:05d}" for number in lying}
    if attack == "label-flip":
        shards = [
            Dataset(shard.inputs, 9 - shard.targets) if number in lying else shard
            for number, shard in enumerate(shards)
        ]
    hook = ATTACKS[attack]
    config = SimulationConfig(
        rounds=rounds,
        clients_per_round=count,
        training=TRAINING,
        codec=CODEC,
        downlink_codec="dense|int8:block=256",
        # An attacker keeps no residual of what it never meant; dense int8 leaves little to feed back.
        error_feedback=False,
        strategy=strategy,
        seed=7,
    )
    tamper = tamper_with(hook, attackers, seed=3) if hook else None
    # FedAvg under attack diverges; its clients then say so.
    with np.errstate(over="ignore"):
        history = list(simulate(session, start, shards, test, config, tamper=tamper))
    accuracies = [result.accuracy for result in history]
    return {
        "accuracy": float(np.mean(accuracies[-3:])),
        "history": [round(float(value), 4) for value in accuracies],
        "refused": sum(len(result.refused) for result in history),
        # Clients whose loss was not finite any more.
        "declined": sum(len(result.declined) for result in history),
    }


def prepare(clients: int, alpha: float, directory: Path) -> tuple[Session, np.ndarray, list[Dataset], Dataset]:
    bundle = directory / "digits.edge"
    command = [sys.executable, "-m", "edgetrain", "-q", "export", "digits-cnn", "--micro-batch", "32"]
    subprocess.run([*command, "-o", str(bundle)], check=True)
    train, test = digits(seed=7)
    indices = dirichlet_split(train.targets, clients, alpha, 7, min_per_client=20)
    parts = [take(train, part) for part in indices]
    shards = [Dataset(part.inputs, part.targets) for part in parts]
    opened = Bundle(bundle)
    return (
        open_session(opened, threads=1),
        opened.initial_parameters(),
        shards,
        Dataset(test.inputs, test.targets),
    )


def table_of(options: argparse.Namespace, alpha: float, directory: Path) -> dict[str, Any]:
    """All strategies against all attacks at one degree of inequality."""
    session, start, shards, test = prepare(options.clients, alpha, directory)
    print(f"Dirichlet alpha {alpha:g}, accuracy in %\n")
    print(f"{'':26}" + "".join(f"{attack:>20}" for attack in options.attacks))
    table: dict[str, dict[str, Any]] = {}
    for name in options.strategies:
        row = table[name] = {}
        print(f"{name:26}", end="", flush=True)
        for attack in options.attacks:
            row[attack] = run(session, start, shards, test, STRATEGIES[name], attack, options.rounds)
            print(f"{row[attack]['accuracy'] * 100:20.1f}", end="", flush=True)
        print()
    clean = table[options.strategies[0]][options.attacks[0]]["accuracy"]
    against = f"points below {options.strategies[0]} with attack {options.attacks[0]!r}"
    print(f"\nbest strategy against each attack, {against}:")
    for attack in options.attacks:
        best = max(table, key=lambda name, attack=attack: table[name][attack]["accuracy"])
        print(f"  {attack:26} {best:26} {100 * (clean - table[best][attack]['accuracy']):+6.1f}")
    print(f"worst attack on each strategy, {against}:")
    for name, row in table.items():
        worst = min(row, key=lambda attack: row[attack]["accuracy"])
        print(f"  {name:26} {worst:26} {100 * (clean - row[worst]['accuracy']):+6.1f}")
    print()
    return {"alpha": alpha, "strategies": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    started = time.monotonic()
    attackers = round(SHARE * options.clients)
    print(f"{options.clients} clients, {attackers} of them attackers, {options.rounds} rounds, codec {CODEC}")
    tables = []
    for alpha in options.alphas:
        with tempfile.TemporaryDirectory() as directory:
            tables.append(table_of(options, alpha, Path(directory)))
    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "clients": options.clients,
        "attackers": attackers,
        "rounds": options.rounds,
        "codec": CODEC,
        "machine": platform.machine(),
        "seconds": round(time.monotonic() - started),
        "tables": tables,
    }
    (options.out / "attacks.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{options.out / 'attacks.json'}, {document['seconds']} s")


if __name__ == "__main__":
    main()

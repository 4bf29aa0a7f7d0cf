"""`edgetrain demo`: the whole thing on one machine, with real digits, a real broker and real client processes."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from edgetrain.coordinator.broker import BrokerKind, LocalBroker, start_broker
from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig, StopConfig, to_toml
from edgetrain.coordinator.processes import spawn, stop
from edgetrain.coordinator.run.records import Summary
from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.errors import ConfigError, EdgetrainError
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport, parse_broker

MARKER = "demo.toml"
SEED = 7
MICRO_BATCH = 32
# Clients end by themselves when the run does.
LEAVE_SECONDS = 15.0


@click.command("demo")
@click.option("--clients", type=click.IntRange(1, 64), default=4, show_default=True, help="Number of client processes.")
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Rounds of training.")
@click.option("--out", default="edgetrain-demo", show_default=True, help="Directory for everything the demo writes.")
@click.option(
    "--broker",
    metavar="embedded|mosquitto|HOST:PORT",
    help="MQTT broker. [default: mosquitto where it is installed, else embedded]",
)
@click.option(
    "--non-iid",
    "alpha",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Dirichlet concentration of the labels; smaller is more unequal.",
)
def command(clients: int, rounds: int, out: str, broker: str | None, alpha: float) -> None:
    """Train a CNN on the 1,797 real digits of scikit-learn with several client processes over MQTT."""
    from rich.console import Console

    from edgetrain.cli.plot import plot_rounds
    from edgetrain.cli.progress import Progress
    from edgetrain.coordinator.serve import serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    _check_broker(broker)
    directory = _prepare(Path(out))
    started = time.monotonic()
    with console.status("exporting digits-cnn and proving its gradients"):
        bundle = _export(directory)
    with contextlib.ExitStack() as stack:
        address, local = _broker(broker)
        if local:
            stack.callback(local.stop)
        config = _federation(directory, bundle, address, clients, rounds)
        (directory / MARKER).write_text(to_toml(config), encoding="utf-8")
        shards = _split(directory, clients, alpha)
        console.print(
            f"{clients} clients with {', '.join(map(str, shards))} images, Dirichlet alpha {alpha:g}, "
            f"broker {address.host}:{address.port}"
        )
        processes = stack.enter_context(_clients(directory, address, clients))
        with Progress(config, console) as progress:
            try:
                summary = serve(config, progress)
            except EdgetrainError as error:
                raise type(error)(f"{error}{_last_words(directory, processes)}") from error
        _let_go(processes)
    plot = directory / "plot.png"
    plot_rounds(directory / "run" / "rounds.jsonl", plot, title=f"digits-cnn, {clients} clients, alpha {alpha:g}")
    shutil.copyfile(directory / "run" / "summary.json", directory / "summary.json")
    _print_summary(console, summary, directory, time.monotonic() - started)


def _prepare(out: Path) -> Path:
    """A fresh directory; an earlier demo's is replaced, anything else is left alone."""
    if out.is_dir() and (out / MARKER).is_file():
        shutil.rmtree(out)
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty and not an earlier demo's; choose another --out")
    elif out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from error
    return out


def _export(directory: Path) -> Path:
    """In a process of its own, so that torch's memory goes with it."""
    bundle = directory / "digits-cnn.edge"
    arguments = ["--quiet", "export", "digits-cnn", "--micro-batch", str(MICRO_BATCH), "-o", str(bundle)]
    process = spawn([sys.executable, "-m", "edgetrain", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate()
    finally:
        stop(process)
    if process.returncode:
        raise EdgetrainError(f"the export failed: {output.decode(errors='replace').strip()}")
    return bundle


def _check_broker(choice: str | None) -> None:
    """Before the minute that the rest takes: is there a broker where we were told?"""
    if choice not in {None, *get_args(BrokerKind)}:
        host, port = parse_broker(str(choice))
        config = BrokerConfig(host=host, port=port, connect_timeout_seconds=1.0)
        MqttTransport(config, client_id="edgetrain/demo").close()


def _broker(choice: str | None) -> tuple[BrokerConfig, LocalBroker | None]:
    if choice not in {None, "embedded", "mosquitto"}:
        host, port = parse_broker(str(choice))
        return BrokerConfig(host=host, port=port), None
    local = start_broker(choice)  # type: ignore[arg-type]
    return BrokerConfig(host="127.0.0.1", port=local.port, mqtt_version=local.mqtt_version), local


def _federation(directory: Path, bundle: Path, broker: BrokerConfig, clients: int, rounds: int) -> FederationConfig:
    return FederationConfig(
        federation="digits",
        bundle=str(bundle),
        out=str(directory / "run"),
        broker=broker,
        seed=SEED,
        rounds=RoundsConfig(
            total=rounds,
            goal=clients,
            minimum=max(1, clients // 2),
            deadline_seconds=60,
            gather_seconds=60,
            idle_timeout_seconds=30,
        ),
        training=TrainingConfig(epochs=2, batch_size=MICRO_BATCH, learning_rate=0.1, momentum=0.5),
        stop=StopConfig(),
        evaluation=EvaluationConfig(data=str(directory / "test.npz")),
    )


def _split(directory: Path, clients: int, alpha: float) -> list[int]:
    """Writes the clients' shards and the coordinator's test images; returns the shards' sizes."""
    from edgetrain.models.data import digits, dirichlet_split, take

    train, test = digits(seed=SEED)
    np.savez(directory / "test.npz", inputs=test.inputs, targets=test.targets)
    shards = dirichlet_split(train.targets, clients, alpha, SEED, min_per_client=20)
    for number, indices in enumerate(shards, 1):
        shard = take(train, indices)
        np.savez(directory / f"shard-{number}.npz", inputs=shard.inputs, targets=shard.targets)
    return [len(indices) for indices in shards]


@contextlib.contextmanager
def _clients(directory: Path, broker: BrokerConfig, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(1, count + 1):
            name = f"client-{number}"
            config = ClientConfig(
                name=name,
                federation="digits",
                data=str(directory / f"shard-{number}.npz"),
                state=str(directory / name),
                broker=broker,
            )
            path = directory / f"{name}.toml"
            path.write_text(to_toml(config), encoding="utf-8")
            with (directory / f"{name}.log").open("wb") as log:
                processes.append(
                    spawn(
                        [sys.executable, "-m", "edgetrain", "client", "--config", str(path)],
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                    )
                )
        yield processes
    finally:
        for process in processes:
            stop(process)


def _let_go(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))


def _last_words(directory: Path, processes: list[subprocess.Popen[bytes]]) -> str:
    """What clients that ended early said last."""
    words = []
    for number, process in enumerate(processes, 1):
        if process.poll():
            log = (directory / f"client-{number}.log").read_text(errors="replace").strip().splitlines()
            words.append(f"\nclient-{number} ended with status {process.returncode}: {log[-1] if log else ''}")
    return "".join(words)


def _print_summary(console: Any, summary: Summary, directory: Path, seconds: float) -> None:
    from rich.table import Table

    from edgetrain.cli.progress import size

    updates = max(1, summary.updates)
    accuracies = summary.accuracy_by_client
    table = Table(title="summary", title_justify="left", show_header=False)
    table.add_row("test accuracy", f"{summary.final_accuracy or 0:.2%} (best {summary.best_accuracy or 0:.2%})")
    table.add_row("test loss", f"{summary.final_loss or 0:.4f}")
    table.add_row("rounds", f"{summary.rounds} in {summary.seconds:.1f} s, {summary.seconds_per_round:.2f} s a round")
    table.add_row(
        "update",
        f"{size(summary.update_bytes_mean)} per client and round, {summary.reduction:.1f}x smaller than float32",
    )
    table.add_row(
        "all traffic",
        f"{size(summary.bytes_up / updates)} up and {size(summary.bytes_down / updates)} down per client and round; "
        f"{size(summary.bytes_up)} up in all (float32 updates: {size(summary.bytes_up_float32)})",
    )
    table.add_row("client memory", f"{summary.client_peak_mb:.0f} MB at the peak of the largest process")
    table.add_row(
        "on the clients' own held-out images",
        ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()) or "not reported",
    )
    table.add_row("whole demo", f"{seconds:.1f} s")
    table.add_row("written to", f"{directory}/: summary.json, plot.png, run/")
    console.print(table)

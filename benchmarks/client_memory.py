"""Peak memory of a whole client process, from its start to its goodbye, on mobilenet-v2.

    python benchmarks/client_memory.py

A real coordinator and a real client, each a process of its own, over a broker on this machine: the client fetches the
bundle, proves it, computes and keeps features, trains two rounds of two epochs on 576 images, evaluates, and sends its
updates; optimizer steps take 8 images, in micro-batches of 8 or 2. What is printed is VmHWM of the client as it reports
it after its last round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from step_time import machine  # type: ignore[import-not-found]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SELECTIONS = {
    "mobilenet-v2, head": "head",
    "mobilenet-v2, last four blocks": r"^features\.(1[6-9]|2)|^head",
}
SAMPLES = 576
SECONDS = 600


@dataclass(frozen=True)
class ClientRow:
    entry: str
    micro_batch: int
    feature_cache: str
    peak_mb: float
    cache_bytes: int
    data_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frozen", default="float32", help="as for `edgetrain export`")
    parser.add_argument("--cache", nargs="+", default=["float16", "off"], help="settings of feature_cache")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--bundles", type=Path, help="folder of bundles to be used again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = arguments.bundles or folder
        for number, (entry, selection) in enumerate(SELECTIONS.items()):
            for size in arguments.micro_batch:
                bundle = bundles / f"mobilenet-{number}-{size}-{arguments.frozen}"
                if not bundle.exists():
                    options = ["--trainable", selection, "--micro-batch", str(size), "--frozen", arguments.frozen]
                    run(["--quiet", "export", "mobilenet-v2", *options, "-o", str(bundle)]).communicate()
                write_data(bundle, folder / "data.npz")
                for cache in arguments.cache:
                    found = federation(folder / f"{number}-{size}-{cache}", bundle, cache)
                    rows.append(ClientRow(entry, size, cache, **found))
                    print(rows[-1], flush=True)
    record = {"machine": machine(), "frozen": arguments.frozen, "clients": [asdict(row) for row in rows]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "client_memory.json").write_text(json.dumps(record, indent=2) + "\n")


def run(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen([sys.executable, "-m", "edgetrain", *arguments], env=environment, **options)


def write_data(bundle: Path, out: Path) -> None:
    """The example batch again and again: what the images show does not matter here."""
    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.protocol.bundle import Bundle

    (inputs, targets), _ = read_self_test(Bundle(bundle))
    times = SAMPLES // len(targets)
    np.savez(out, inputs=np.concatenate([inputs] * times), targets=np.concatenate([targets] * times))  # type: ignore[arg-type,list-item]


def federation(folder: Path, bundle: Path, cache: str) -> dict[str, Any]:
    from edgetrain.coordinator.broker import start_broker
    from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig, to_toml
    from edgetrain.edge_client.config import ClientConfig
    from edgetrain.protocol.training import TrainingConfig
    from edgetrain.protocol.transport.mqtt import BrokerConfig

    folder.mkdir()
    local = start_broker(None)
    try:
        broker = BrokerConfig(host="127.0.0.1", port=local.port, mqtt_version=local.mqtt_version)
        data = folder.parent / "data.npz"
        configs = {
            "coordinator": FederationConfig(
                federation="memory",
                bundle=str(bundle),
                out=str(folder / "run"),
                broker=broker,
                rounds=RoundsConfig(total=2, goal=1, minimum=1, deadline_seconds=SECONDS),
                training=TrainingConfig(epochs=2, batch_size=8, learning_rate=0.01),
                evaluation=EvaluationConfig(),
            ),
            "client": ClientConfig(
                name="client",
                federation="memory",
                data=str(data),
                state=str(folder / "state"),
                broker=broker,
                feature_cache=cache,  # type: ignore[arg-type]
            ),
        }
        processes = []
        for command, config in configs.items():
            path = folder / f"{command}.toml"
            path.write_text(to_toml(config), encoding="utf-8")
            with (folder / f"{command}.log").open("wb") as log:
                processes.append(run([command, "--config", str(path)], stdout=log, stderr=log))
        for process, command in zip(processes, configs, strict=True):
            if process.wait(SECONDS):
                raise RuntimeError((folder / f"{command}.log").read_text())
    finally:
        local.stop()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    files = folder / "state"
    return {
        "peak_mb": round(summary["client_peak_mb"], 1),
        "cache_bytes": sum(path.stat().st_size for path in files.glob("features-*.bin")),
        "data_bytes": data.stat().st_size,
    }


if __name__ == "__main__":
    main()

"""Load: a real mosquitto, a real coordinator, and many connections that come and go.

    python benchmarks/load.py [--connections 1000] [--drivers 4] [--rounds 50] [--churn 0.1] [--parameters 10000]

Reports the time of a round, the coordinator's memory over time, and messages lost or counted twice; writes
results/load.json. A share of the clients loses its connection in the middle of every round's upload.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import tomli_w
from blank import write_blank_bundle
from swarm import FEDERATION

from edgetrain.coordinator.broker import Mosquitto, free_port

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--drivers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--churn", type=float, default=0.1)
    parser.add_argument("--parameters", type=int, default=10_000)
    parser.add_argument("--codec", default="dense|int8")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "load.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "memory_mb"}, indent=1))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    names = [f"c{number:05d}" for number in range(arguments.connections)]
    # Those who are cut off come back in the same round or sit it out.
    goal = int(arguments.connections * (1 - arguments.churn / 2))
    port = free_port()
    bundle = write_blank_bundle(folder / "blank", arguments.parameters)
    config = {
        "federation": FEDERATION, "bundle": str(bundle), "out": str(folder / "run"), "codec": arguments.codec,
        "broker": {"host": "127.0.0.1", "port": port},
        "rounds": {"total": arguments.rounds, "goal": goal, "minimum": goal // 2, "deadline_seconds": 120.0,
                   "gather_seconds": 120.0, "over_selection": arguments.connections / goal},
        "evaluation": {"by_clients": False},
    }  # fmt: skip
    (folder / "federation.toml").write_text(tomli_w.dumps(config))
    broker = Mosquitto(port)
    processes = []
    try:
        for driver in range(arguments.drivers):
            settings = {"port": port, "names": names[driver :: arguments.drivers], "codec": arguments.codec,
                        "num_parameters": arguments.parameters, "churn": arguments.churn, "seed": driver}  # fmt: skip
            command = [sys.executable, HERE / "swarm.py", json.dumps(settings)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", "edgetrain", "coordinator", "--config", folder / "federation.toml"]
            coordinator = subprocess.Popen(command, stdout=log, stderr=log)
        processes.append(coordinator)
        memory = watch(coordinator)
        assert coordinator.returncode == 0, (folder / "log").read_text()[-2000:]
        told = [tuple(entry) for process in processes[:-1] for entry in json.loads(process.communicate(timeout=60)[0])]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        broker.stop()
    return summarize(arguments, folder / "run", told, memory)


def watch(coordinator: subprocess.Popen[bytes]) -> list[tuple[float, float]]:
    """(seconds, resident MB) of the coordinator, until it ends."""
    started, memory = time.monotonic(), []
    process = psutil.Process(coordinator.pid)
    while coordinator.poll() is None:
        try:
            memory.append((round(time.monotonic() - started, 1), round(process.memory_info().rss / 2**20, 1)))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    coordinator.wait()
    return memory


def summarize(
    arguments: argparse.Namespace, run: Path, told: list[tuple[str, int, bool]], memory: list[tuple[float, float]]
) -> dict[str, object]:
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    with (run / "clients.csv").open() as file:
        counted = Counter(
            (row["client"], int(row["round"])) for row in csv.DictReader(file) if row["status"] == "accepted"
        )
    acknowledged = {(name, number) for name, number, accepted in told if accepted}
    seconds = [record["seconds"] for record in records]
    settled = [size for at, size in memory if at > memory[-1][0] * 0.2]
    # A run too short for two looks at it has grown by nothing.
    slope = float(np.polyfit(range(len(settled)), settled, 1)[0]) * len(settled) if len(settled) > 1 else 0.0
    return {
        "machine": platform.processor() or platform.machine(),
        "connections": arguments.connections, "drivers": arguments.drivers, "rounds": len(records),
        "churn": arguments.churn, "parameters": arguments.parameters,
        "updates": sum(counted.values()),
        "round_seconds_median": round(float(np.median(seconds)), 3),
        "round_seconds_p95": round(float(np.quantile(seconds, 0.95)), 3),
        "updates_per_second": round(sum(counted.values()) / sum(seconds), 1),
        "acknowledged_but_lost": len(acknowledged - counted.keys()),
        "counted_twice": sum(count > 1 for count in counted.values()),
        "refused_as_late": sum(not accepted for _, _, accepted in told),
        "memory_mb_after_a_fifth_and_at_the_end": [settled[0], settled[-1]],
        "memory_mb_grown_by_a_straight_line": round(slope, 1),
        # Some fifty of what was measured twice a second.
        "memory_mb": memory[:: max(1, len(memory) // 50)],
    }  # fmt: skip


if __name__ == "__main__":
    main()

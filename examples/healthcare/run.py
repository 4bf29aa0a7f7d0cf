"""Five hospitals, one model, a privacy budget: everything on this machine, every party a process of its own.

python examples/healthcare/run.py --out /tmp/hospitals
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

from edgetrain.coordinator.broker import start_broker
from edgetrain.protocol.privacy.calibrate import noise_multiplier_for
from edgetrain.protocol.privacy.distributed import distributed_noise
from edgetrain.protocol.privacy.release import Release
from edgetrain.protocol.secure_aggregation.arithmetic import Quantizer

HERE = Path(__file__).parent
HOSPITALS = ("aachen", "bergen", "cadiz", "dublin", "evora")
ROUNDS = 10
# What the ten rounds may reveal about one hospital. See README.md on why it is large here.
EPSILON, DELTA = 10.0, 1e-3
CLIP_NORM = 1.0
PARAMETERS = 62
# Updates are quantized to 127 steps in this range on either side: about 4 CLIP_NORM / sqrt(PARAMETERS).
VALUE_RANGE = 0.5
TEST_SHARE = 0.3
# Of each measurement, as in the textbooks that all hospitals have: computed from the patients' own records, they
# would have to be paid for, too.
TYPICAL = (
    14, 19, 92, 650, 0.096, 0.1, 0.089, 0.049, 0.18, 0.063,
    0.41, 1.2, 2.9, 40, 0.007, 0.025, 0.032, 0.012, 0.021, 0.0038,
    16, 26, 110, 880, 0.13, 0.25, 0.27, 0.11, 0.29, 0.084,
)  # fmt: skip
SPREAD = (
    3.5, 4.3, 24, 350, 0.014, 0.053, 0.08, 0.039, 0.027, 0.0071,
    0.28, 0.55, 2, 45, 0.003, 0.018, 0.03, 0.0062, 0.0083, 0.0026,
    4.8, 6.1, 34, 570, 0.023, 0.16, 0.21, 0.066, 0.062, 0.018,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hospitals"))
    parser.add_argument("--broker", choices=("mosquitto", "embedded"), help="[default: mosquitto where it is]")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True)
    write_data(out)
    edgetrain("--quiet", "export", f"{HERE / 'model.py'}:make", "-o", out / "tumours.edge")
    noise_multiplier = noise_multiplier_for(EPSILON, DELTA, lambda noise: [one_round(noise)] * ROUNDS)
    print(f"{ROUNDS} rounds within epsilon {EPSILON:g} at delta {DELTA:g}: noise multiplier {noise_multiplier:.3f}")
    broker = start_broker(arguments.broker)
    try:
        address = f"127.0.0.1:{broker.port}"
        write_settings(out, address, broker.mqtt_version, noise_multiplier, ROUNDS)
        federate(out)
        # One round more than the budget pays for: it is refused before anybody is asked.
        write_settings(out, address, broker.mqtt_version, noise_multiplier, ROUNDS + 1)
        edgetrain("coordinator", "--config", out / "federation.toml")
    finally:
        broker.stop()
    report(out)


def one_round(noise_multiplier: float) -> Release:
    """What a round reveals: a sum with a share of noise from each hospital."""
    return distributed_noise(
        "discrete-gaussian",
        noise_multiplier=noise_multiplier,
        l2_steps=CLIP_NORM / Quantizer(range=VALUE_RANGE).step,
        dimension=PARAMETERS,
        clients=len(HOSPITALS),
    ).release


def write_data(out: Path) -> None:
    """Patients to hospitals, of different sizes; a test set that no hospital trains on."""
    data = load_breast_cancer()
    inputs, targets = data.data.astype(np.float32), data.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(inputs))
    test, train = np.split(order, [int(TEST_SHARE * len(order))])
    inputs = (inputs - np.array(TYPICAL, np.float32)) / np.array(SPREAD, np.float32)
    shares = np.cumsum([0.3, 0.25, 0.2, 0.15])
    for name, part in zip(HOSPITALS, np.split(train, (shares * len(train)).astype(int)), strict=True):
        np.savez(out / f"{name}.npz", inputs=inputs[part], targets=targets[part])
    np.savez(out / "test.npz", inputs=inputs[test], targets=targets[test])


def write_settings(out: Path, address: str, version: str, noise_multiplier: float, total: int) -> None:
    """federation.toml and a device.toml for each hospital."""
    host, port = address.split(":")
    broker = f'[broker]\nhost = "{host}"\nport = {port}\nmqtt_version = "{version}"\n'
    (out / "federation.toml").write_text(f"""\
federation = "hospitals"
bundle = "{out / "tumours.edge"}"
out = "{out / "run"}"
strategy = "fedavg"
codec = "dense|int8:block=all:stochastic|packed"

[rounds]
total = {total}
goal = {len(HOSPITALS)}
deadline_seconds = 60.0
gather_seconds = 60.0
idle_timeout_seconds = 60.0

[training]
epochs = 3
batch_size = 16
learning_rate = 0.5

# The coordinator sees one sum of all five, with noise that they added themselves.
[secure_aggregation]
enabled = true
weighting = "equal"
adapt_range = false
value_range = {VALUE_RANGE}
max_norm = {CLIP_NORM}
noise_multiplier = {noise_multiplier}

[privacy]
epsilon = {EPSILON}
delta = {DELTA}

[evaluation]
data = "{out / "test.npz"}"
by_clients = false

{broker}""")
    for name in HOSPITALS:
        (out / f"{name}.toml").write_text(f"""\
name = "{name}"
federation = "hospitals"
data = "{out / name}.npz"
state = "{out / name}"
validation_fraction = 0.0

{broker}""")


def federate(out: Path) -> None:
    """The coordinator here, five hospitals beside it."""
    clients = [
        subprocess.Popen([sys.executable, "-m", "edgetrain", "--quiet", "client", "--config", out / f"{name}.toml"])
        for name in HOSPITALS
    ]
    try:
        edgetrain("coordinator", "--config", out / "federation.toml")
        for client in clients:
            client.wait(timeout=30)
    finally:
        for client in clients:
            client.kill()
            client.wait()


def report(out: Path) -> None:
    """The budget round by round, and the audit."""
    rounds = [json.loads(line) for line in (out / "run/rounds.jsonl").read_text().splitlines()]
    print("\nround  accuracy  epsilon spent")
    for record in rounds:
        print(f"{record['round']:5d}  {record['accuracy']:8.1%}  {record['epsilon']:7.3f} of {EPSILON:g}")
    summary = json.loads((out / "run/summary.json").read_text())
    print(f"\n{summary['reason']}\n")
    edgetrain("audit", "verify", out / "run")


def edgetrain(*arguments: object) -> None:
    """Runs a command; raises if it fails."""
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "edgetrain", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()

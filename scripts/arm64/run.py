"""The host's half of `scripts/test-arm64`: bundles, a broker, a coordinator, and emulated devices.

    python run.py FOLDER

`EDGETRAIN_ARM64_RUN` is the command that starts the emulated Python.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgetrain.coordinator.broker import start_broker
from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig, to_toml
from edgetrain.coordinator.processes import spawn, stop
from edgetrain.coordinator.serve import serve
from edgetrain.edge_client.config import ClientConfig
from edgetrain.export import Storage, export_bundle
from edgetrain.models.registry import get_model
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport.mqtt import BrokerConfig

HERE = Path(__file__).parent
VECTORS = HERE.parent.parent / "tests" / "vectors" / "codecs"
EMULATED = shlex.split(os.environ["EDGETRAIN_ARM64_RUN"])
RUNTIMES = ("onnxruntime", "executorch")
MICRO_BATCH = 8
# So many images at a time are a step that executorch's lowering takes apart.
LARGE_BATCH = 512
IMAGES = 24


def export_bundles(folder: Path) -> list[Path]:
    """A CNN and a small Transformer for both runtimes; for executorch the CNN in parts in integers, and in slices."""
    cnn = get_model("digits-cnn", batch_size=MICRO_BATCH)
    models = {
        "digits-cnn": (cnn, {"runtimes": RUNTIMES}),
        "char-lm": (get_model("char-lm", batch_size=2, width=32, layers=1, length=16), {"runtimes": RUNTIMES}),
        "digits-cnn-head": (
            cnn,
            {"runtimes": ("executorch",), "trainable": "head", "storage": Storage(kind="int8-static")},
        ),
        "digits-cnn-large": (get_model("digits-cnn", batch_size=LARGE_BATCH), {"runtimes": ("executorch",)}),
    }
    paths = []
    for name, (source, options) in models.items():
        out = folder / f"{name}.edge"
        export_bundle(*source, out=out, name=name, **options)
        paths.append(out)
    return paths


def federate(folder: Path, bundle: Path) -> None:
    """One round of two emulated clients, one on each runtime."""
    from edgetrain.models.data import digits, take  # noqa: PLC0415

    train, test = digits(seed=0)
    np.savez(folder / "test.npz", inputs=test.inputs, targets=test.targets)
    broker = start_broker("mosquitto")
    try:
        address = BrokerConfig(host="127.0.0.1", port=broker.port, mqtt_version=broker.mqtt_version)
        config = FederationConfig(
            federation="arm64",
            bundle=str(bundle),
            out=str(folder / f"run-{os.getpid()}"),
            broker=address,
            rounds=RoundsConfig(
                total=1, goal=2, minimum=2, deadline_seconds=120, gather_seconds=120, idle_timeout_seconds=60
            ),
            training=TrainingConfig(epochs=1, batch_size=MICRO_BATCH, learning_rate=0.05),
            evaluation=EvaluationConfig(data=str(folder / "test.npz")),
        )
        with contextlib.ExitStack() as stack:
            for number, runtime in enumerate(RUNTIMES):
                shard = take(train, np.arange(number * IMAGES, (number + 1) * IMAGES))
                data = folder / f"shard-{runtime}.npz"
                np.savez(data, inputs=shard.inputs, targets=shard.targets)
                stack.enter_context(client(folder, runtime, data, address))
            summary = serve(config, lambda _record: None)
        if summary.rounds != 1 or summary.updates != 2:
            sys.exit(f"the round failed: {summary}")
        print(
            f"one round: {summary.updates} updates of {summary.update_bytes_mean:.0f} bytes from emulated "
            f"clients on {' and '.join(RUNTIMES)}, {summary.seconds:.0f} s"
        )
    finally:
        broker.stop()


@contextlib.contextmanager
def client(folder: Path, runtime: str, data: Path, broker: BrokerConfig) -> Iterator[None]:
    """An emulated client process."""
    name = f"pi-{runtime}-{os.getpid()}"
    config = ClientConfig(
        name=name,
        federation="arm64",
        data=str(data),
        state=str(folder / name),
        runtime=runtime,
        broker=broker,
    )
    path = folder / f"{name}.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = spawn(
            [*EMULATED, "-m", "edgetrain", "client", "--config", str(path)],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield
    except BaseException:
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise
    finally:
        stop(process)


def main(folder: Path) -> None:
    """Everything, or the first failure."""
    started = time.monotonic()
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    bundles = export_bundles(work)
    print(f"exported in {time.monotonic() - started:.0f} s", flush=True)
    done = subprocess.run([*EMULATED, str(HERE / "device.py"), str(VECTORS), *map(str, bundles)], check=False)  # noqa: S603
    if done.returncode != 0:
        sys.exit(f"the emulated device failed with status {done.returncode}")
    federate(work, bundles[0])
    print(f"arm64: all passed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

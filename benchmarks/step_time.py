"""Time and memory of one training step: every runtime here against eager torch.

    python benchmarks/step_time.py                        # two models, all runtimes
    python benchmarks/step_time.py vit-tiny --trainable last:2 --micro-batch 4

Each contender runs in a process of its own, on one thread, and they take turns step by step, so that whatever
else the machine does hits all alike. Memory is the peak resident set of that process; of eager torch the data
set that its model builder reads is left out. The runtime `ort-training` is measured with the Python of
`.venv-ort-training` if that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRAINING_PYTHON = ROOT / ".venv-ort-training" / "bin" / "python"
EAGER = "eager torch"
WARM_UP = 3


@dataclass(frozen=True)
class Measurement:
    model: str
    trainable: str
    micro_batch: int
    parameters: int
    contender: str
    milliseconds: float
    # Of the same model and selection.
    ratio_to_eager: float
    peak_mb: float
    megabytes_of_program: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=["digits-cnn", "char-lm"])
    parser.add_argument("--trainable", nargs="+", default=["all"], help="selections, as for `edgetrain export`")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contender")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments.contender, arguments.bundle, arguments.models[0])
        return
    from edgetrain.models import MODELS

    if unknown := [model for model in arguments.models if model not in MODELS]:
        parser.error(f"no model {unknown[0]!r}; there are: {', '.join(MODELS)}")
    measurements = []
    for model in arguments.models:
        for trainable in arguments.trainable:
            measurements += measure(model, trainable, arguments.micro_batch, arguments.seconds)
    print_table(measurements)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "measurements": [asdict(found) for found in measurements]}
    (arguments.out / "step_time.json").write_text(json.dumps(record, indent=2) + "\n")


def measure(model: str, trainable: str, micro_batch: int, seconds: float) -> list[Measurement]:
    """Exports a model and lets the contenders take turns."""
    # Here, so that the contenders' processes have no more in memory than their session needs.
    import statistics

    from edgetrain.export import export_bundle
    from edgetrain.models import get_model
    from edgetrain.protocol.bundle import Bundle

    runtimes = ["onnxruntime", "torch", *(["ort-training"] if TRAINING_PYTHON.exists() else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        print(f"exporting {model}, {trainable} …", file=sys.stderr)
        source = get_model(model, batch_size=micro_batch)
        export_bundle(*source, trainable=trainable, runtimes=runtimes, out=path, name=model)
        manifest = Bundle(path).manifest
        contenders = {name: start(name, path, model) for name in [EAGER, *runtimes]}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        while sum(map(sum, times.values())) < seconds * len(contenders):
            for name, process in contenders.items():
                times[name].append(ask(process, "step"))
        peaks = {name: ask(process, "peak") for name, process in contenders.items()}
        for process in contenders.values():
            process.communicate("stop\n")
    medians = {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}
    return [
        Measurement(
            model=model,
            trainable=trainable,
            micro_batch=micro_batch,
            parameters=manifest.num_parameters,
            contender=name,
            milliseconds=round(1000 * median, 3),
            ratio_to_eager=round(median / medians[EAGER], 3),
            peak_mb=round(peaks[name], 1),
            megabytes_of_program=0.0
            if name == EAGER
            else round(manifest.program(name).graphs["step"].file.size / 1e6, 3),
        )
        for name, median in medians.items()
    ]


def start(contender: str, bundle: Path, model: str) -> subprocess.Popen[str]:
    python = TRAINING_PYTHON if contender == "ort-training" else sys.executable
    command = [str(python), __file__, model, "--contender", contender, "--bundle", str(bundle)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str], question: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def contend(contender: str, bundle: Path, model: str) -> None:
    """The process of one contender: answers on its standard output."""
    step = eager_step(bundle, model) if contender == EAGER else session_step(bundle, contender)
    for line in sys.stdin:
        if line.strip() == "step":
            begin = time.perf_counter()
            step()
            print(time.perf_counter() - begin, flush=True)
        elif line.strip() == "peak":
            print(peak_megabytes(), flush=True)
        else:
            return


def client_session(bundle: Any, runtime: str, *, in_parts: bool = False) -> Any:
    """A session that saves memory, as a client's does."""
    from edgetrain.edge_client import open_session

    session = open_session(bundle, runtime, load=False)
    session.save_memory(in_parts=in_parts)
    return session


def session_step(path: Path, runtime: str) -> Callable[[], object]:
    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.protocol.bundle import Bundle

    bundle = Bundle(path)
    session = client_session(bundle, runtime)
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters()
    # The same vector each time: training changes it in place.
    return lambda: session.step(parameters, batch, weights)


def eager_step(path: Path, model: str) -> Callable[[], object]:
    import torch

    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.models import get_model
    from edgetrain.models.data import map_leaves
    from edgetrain.protocol.bundle import Bundle

    torch.set_num_threads(1)
    bundle = Bundle(path)
    trainable = {entry.name for entry in bundle.manifest.parameters}
    source = get_model(model, batch_size=bundle.manifest.micro_batch)
    for name, parameter in source.module.named_parameters():
        parameter.requires_grad_(name in trainable)
    source.module.eval()
    reset_peak()
    batch, weights_array = read_self_test(bundle)
    inputs, targets = (map_leaves(torch.from_numpy, half) for half in batch)
    weights = torch.from_numpy(weights_array)

    def step() -> None:
        source.module.zero_grad(set_to_none=True)
        if isinstance(inputs, dict):
            outputs = source.module(**inputs)
        else:
            outputs = source.module(*inputs) if isinstance(inputs, tuple) else source.module(inputs)
        (source.loss(outputs, targets) * weights).sum().backward()

    return step


def peak_megabytes() -> float:
    """Peak resident set of this process: VmHWM, as `ru_maxrss` begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> dict[str, object]:
    import onnxruntime
    import torch

    return {
        "architecture": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def print_table(measurements: list[Measurement]) -> None:
    print("| model | trainable | parameters | contender | ms a step | of eager | peak MB | program MB |")
    print("|---|---|---|---|---|---|---|---|")
    for m in measurements:
        program = f"{m.megabytes_of_program:.2f}" if m.megabytes_of_program else "–"
        print(
            f"| {m.model} | {m.trainable} | {m.parameters:,} | {m.contender} | {m.milliseconds:.2f} | "
            f"{m.ratio_to_eager:.2f} | {m.peak_mb:.0f} | {program} |"
        )


if __name__ == "__main__":
    main()

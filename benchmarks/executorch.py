"""ExecuTorch against itself, eager torch and onnxruntime: time and memory of one training step on suite S.

    python benchmarks/executorch.py                 # all entries, ten minutes or so: lowering is slow
    python benchmarks/executorch.py char-lm-last    # one

Contenders, each in a process of its own, on one thread, taking turns step by step:

- eager torch
- stock: `_export_forward_backward` with ExecuTorch's portable kernels and its bindings, as its examples train
- training module: our program for ExecuTorch's TrainingModule, with its bindings
- bindings: our program with ExecuTorch's own bindings, which need torch
- executorch: our program with our session, without torch
- executorch, head: the head alone on kept features, where something is frozen
- onnxruntime: the same step as plain ONNX

Each time is the quickest of its turns, since what else the machine does can only add. Memory is the peak resident set
of a fresh process that only runs the session, told to save memory as a client does.

    python benchmarks/executorch.py --arena         # planned bytes of every graph, at batch 8 and 1; no times
    python benchmarks/executorch.py --profile       # what ExecuTorch's profiler says of each step: shares of kernels
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from step_time import (  # type: ignore[import-not-found]
    ask,
    client_session,
    eager_step,
    machine,
    peak_megabytes,
    reset_peak,
    session_step,
)
from step_time import time as clock

# This file has the name of the package that it measures: from here on only the package is found.
sys.path.remove(str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# entry -> model, selection
SUITE = {
    "mobilenet-v2-last-4": ("mobilenet-v2", r"^features\.(1[6-9]|2)|^head"),
    "bert-tiny-last": ("bert-tiny", r"^blocks\.1|^pooler|^head"),
    "char-lm-last": ("char-lm", r"^blocks\.3|^norm|^head"),
    "char-lm-full": ("char-lm", "all"),
    "ds-cnn-full": ("ds-cnn", "all"),
    "resnet-8-full": ("resnet-8", "all"),
}
# What `--arena` adds. The selection is MCUNet's way: biases of the last blocks, a quarter of the input channels of some
# of their first pointwise convolutions, and the classifier; the network has 20 million multiplications an image.
SPARSE = (
    r"^features\.1[3-7]\.layers\.\d+\.bias;sparse:fraction=0.25,dim=in,target=^features\.1[4-6]\.layers\.0$"
    ";head"
)
ARENAS = (*((entry, *SUITE[entry]) for entry in SUITE), ("mcunet-sized sparse", "mobilenet-v2", SPARSE))
# Entries that are measured with TrainingModule too; lowering takes long.
TRAINED = ("char-lm-last", "resnet-8-full")
EAGER, STOCK, TRAINING, BINDINGS = "eager torch", "stock", "training module", "bindings"
OURS, HEAD, ONNX = "executorch", "executorch, head", "onnxruntime"
CONTENDERS = (EAGER, STOCK, TRAINING, BINDINGS, OURS, HEAD, ONNX)


@dataclass(frozen=True)
class Measurement:
    entry: str
    contender: str
    milliseconds: float
    # How many times faster than the stock way and than eager torch.
    times_stock: float | None
    times_eager: float
    peak_mb: float
    program_bytes: int
    planned_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("entries", nargs="*", default=list(SUITE), help=", ".join(SUITE))
    parser.add_argument("--micro-batch", type=int, default=8, help="examples of a step")
    parser.add_argument("--steps", type=int, default=20, help="of each contender")
    parser.add_argument("--arena", action="store_true", help="planned bytes only")
    parser.add_argument("--profile", action="store_true", help="kernels by their share of a step, instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [entry for entry in arguments.entries if entry not in SUITE]:
        parser.error(f"no entry {unknown[0]!r}; there are: {', '.join(SUITE)}")
    if arguments.contender:
        contend(arguments.contender, arguments.folder, arguments.entries[0])
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "executorch.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if arguments.arena:
        record["arenas"] = [row for micro_batch in (8, 1) for entry in ARENAS for row in arenas(*entry, micro_batch)]
    if arguments.profile:
        found = {entry: profile(entry, arguments.micro_batch, arguments.steps) for entry in arguments.entries}
        record["profiles"] = record.get("profiles", {}) | found
    if arguments.arena or arguments.profile:
        path.write_text(json.dumps(record, indent=2) + "\n")
        return
    measurements: list[Measurement] = []
    for entry in arguments.entries:
        measurements += measure(entry, arguments.micro_batch, arguments.steps)
        print_table(measurements)
        old = [found for found in record.get("measurements", []) if found["entry"] not in arguments.entries]
        written = record | {"machine": machine(), "measurements": old + [asdict(found) for found in measurements]}
        path.write_text(json.dumps(written, indent=2) + "\n")


def arenas(name: str, model: str, trainable: str, micro_batch: int) -> list[dict[str, object]]:
    """Planned bytes of each graph of an executorch bundle."""
    from edgetrain.export import export_bundle
    from edgetrain.models import get_model
    from edgetrain.protocol.bundle import Bundle

    with tempfile.TemporaryDirectory() as folder:
        source = get_model(model, batch_size=micro_batch)
        path = export_bundle(*source, trainable=trainable, runtimes=(OURS,), out=Path(folder) / "bundle", name=model)
        manifest = Bundle(path).manifest
    rows = []
    for graph, found in manifest.program(OURS).graphs.items():
        row = {"entry": name, "micro_batch": micro_batch, "graph": graph, "planned_bytes": found.planned_memory}
        print(row, manifest.num_parameters, flush=True)
        rows.append(row | {"parameters": manifest.num_parameters})
    return rows


def profile(entry: str, micro_batch: int, steps: int) -> dict[str, float]:
    """What each kernel takes of a step, all its calls together; XNNPACK's partitions are one of them."""
    import torch
    from executorch.devtools import Inspector
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

    from edgetrain.export import export_bundle
    from edgetrain.models import get_model

    model, trainable = SUITE[entry]
    with tempfile.TemporaryDirectory() as name:
        path, log = Path(name) / "bundle", Path(name) / "log.etdp"
        source = get_model(model, batch_size=micro_batch)
        export_bundle(*source, trainable=trainable, runtimes=(OURS,), out=path, name=model)
        one_thread()
        data, arguments = step_arguments(path)
        module = _load_for_executorch_from_buffer(data, enable_etdump=True, debug_buffer_size=0)
        with torch.no_grad():
            for _ in range(steps):
                module.run_method("forward", arguments)
        module.write_etdump_result_to_file(str(log))
        (block,) = (block for block in Inspector(etdump_path=str(log)).event_blocks if block.name == "Execute")
    spent: dict[str, float] = {}
    whole = 0.0
    for event in block.events:
        milliseconds = median(event.perf_data.raw) if event.perf_data else 0.0
        if event.name == "Method::execute":
            whole = milliseconds
        elif event.name == "DELEGATE_CALL" or event.name.startswith("native_call"):
            spent[event.name] = spent.get(event.name, 0.0) + milliseconds
    shares = {name: round(part / whole, 4) for name, part in sorted(spent.items(), key=lambda pair: -pair[1])}
    print(entry, *(f"{name.removeprefix('native_call_')} {share:.1%}" for name, share in shares.items()), sep="\n  ")
    return shares


def measure(entry: str, micro_batch: int, steps: int) -> list[Measurement]:
    from edgetrain.export import export_bundle
    from edgetrain.models import get_model
    from edgetrain.protocol.bundle import Bundle

    model, trainable = SUITE[entry]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"exporting {entry} …", file=sys.stderr)
        source = get_model(model, batch_size=micro_batch)
        path = export_bundle(
            *source,
            trainable=trainable,
            runtimes=(OURS, ONNX),
            executorch_style="training-module" if entry in TRAINED else "functional",
            out=folder / "bundle",
            name=model,
        )
        manifest = Bundle(path).manifest
        graphs = manifest.program(OURS).graphs
        found = list(CONTENDERS)
        for contender, needed in ((HEAD, "head_step"), (TRAINING, "training_module")):
            if needed not in graphs:
                found.remove(contender)
        try:
            names = {parameter.name for parameter in manifest.parameters}
            (folder / "stock.pte").write_bytes(stock_program(source, names))
        except Exception as error:  # noqa: BLE001  # the stock exporter raises whatever it met
            print(f"stock cannot export {entry}: {str(error).splitlines()[0]}", file=sys.stderr)
            found.remove(STOCK)
        processes = {contender: start(contender, folder, entry) for contender in found}
        if STOCK in found:
            try:
                ask(processes[STOCK], "step")
            except (ValueError, BrokenPipeError):
                print(f"stock cannot run {entry}: {last_line(folder)}", file=sys.stderr)
                found.remove(STOCK)
                processes.pop(STOCK).wait()
        times: dict[str, list[float]] = {contender: [] for contender in found}
        for _ in range(steps):
            for contender, process in processes.items():
                times[contender].append(ask(process, "step"))
        peaks = {contender: ask(process, "peak") for contender, process in processes.items()}
        for process in processes.values():
            process.communicate("stop\n")
        stock_bytes = (folder / "stock.pte").stat().st_size if STOCK in found else 0
    best = {contender: min(t) for contender, t in times.items()}
    programs = {
        BINDINGS: graphs["step"],
        OURS: graphs["step"],
        HEAD: graphs.get("head_step"),
        TRAINING: graphs.get("training_module"),
        ONNX: manifest.program(ONNX).graphs["step"],
    }
    rows = []
    for contender, seconds in best.items():
        graph = programs.get(contender)
        rows.append(
            Measurement(
                entry=entry,
                contender=contender,
                milliseconds=round(1000 * seconds, 3),
                times_stock=round(best[STOCK] / seconds, 2) if STOCK in best else None,
                times_eager=round(best[EAGER] / seconds, 3),
                peak_mb=round(peaks[contender], 1),
                program_bytes=graph.file.size if graph else (stock_bytes if contender == STOCK else 0),
                planned_bytes=(graph.planned_memory or 0) if graph else 0,
            )
        )
    return rows


def stock_program(source: Any, trainable: set[str]) -> bytes:
    """The way that ExecuTorch's documentation trains: a joint graph by its exporter, portable kernels."""
    import torch
    from executorch.exir import to_edge
    from torch.export.experimental import _export_forward_backward
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from edgetrain.export.quiet import quiet

    module, loss, (inputs, targets) = source
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)

    class Joint(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module.eval()

        def forward(self, inputs: Any, targets: Any) -> Any:
            outputs = self.net(**inputs) if isinstance(inputs, dict) else self.net(inputs)
            losses = loss(outputs, targets)
            return losses.sum(), losses.detach()

    with quiet(), sdpa_kernel(SDPBackend.MATH):
        joint = _export_forward_backward(torch.export.export(Joint(), (inputs, targets), strict=True))
        return bytes(to_edge(joint).to_executorch().buffer)


def last_line(folder: Path) -> str:
    """What the stock process said last."""
    return (folder / f"{STOCK}.log").read_text(errors="replace").strip().splitlines()[-1]


def start(contender: str, folder: Path, entry: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, entry, "--contender", contender, "--folder", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / f"{contender}.log").open("wb"),
        text=True,
        env=environment,
    )


def contend(contender: str, folder: Path, entry: str) -> None:
    """The process of one contender: answers on its standard output."""
    step = prepare(contender, folder, SUITE[entry][0])
    for line in sys.stdin:
        if line.strip() == "step":
            begin = clock.perf_counter()
            step()
            print(clock.perf_counter() - begin, flush=True)
        elif line.strip() == "peak":
            print(peak_megabytes(), flush=True)
        else:
            return


def prepare(contender: str, folder: Path, model: str) -> Callable[[], object]:
    if contender == EAGER:
        step: Callable[[], object] = eager_step(folder / "bundle", model)
        return step
    if contender == STOCK:
        return stock_step(folder)
    if contender == TRAINING:
        return training_step(folder / "bundle")
    if contender == BINDINGS:
        return bindings_step(folder / "bundle")
    if contender == HEAD:
        return head_step(folder / "bundle")
    return session_step(folder / "bundle", contender)


def tensors(path: Path) -> tuple[Any, Any, list[Any]]:
    """The self-test's inputs and targets, and the parameters."""
    import torch

    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.models.data import map_leaves
    from edgetrain.protocol.bundle import Bundle

    torch.set_num_threads(1)
    bundle = Bundle(path)
    (inputs, targets), weights = read_self_test(bundle)
    vector = torch.from_numpy(bundle.initial_parameters())
    parameters = [entry.of(vector) for entry in bundle.manifest.parameters]
    halves = [map_leaves(torch.from_numpy, half) for half in (inputs, targets)]
    leaves = [leaf for half in halves for leaf in (half.values() if isinstance(half, dict) else [half])]
    return leaves, torch.from_numpy(weights), parameters


def one_thread() -> None:
    """ExecuTorch's bindings take all cores unless they are told."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(1)


def stock_step(folder: Path) -> Callable[[], object]:
    from executorch.extension.training import _load_for_executorch_for_training_from_buffer

    one_thread()
    leaves, _, _ = tensors(folder / "bundle")
    data = (folder / "stock.pte").read_bytes()
    module = _load_for_executorch_for_training_from_buffer(data)
    reset_peak()
    return lambda: (data, module.forward_backward("forward", leaves))


def training_step(path: Path) -> Callable[[], object]:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer
    from executorch.extension.training import TrainingModule

    from edgetrain.protocol.bundle import Bundle

    one_thread()
    bundle = Bundle(path)
    leaves, weights, _ = tensors(path)
    graph = bundle.manifest.program(OURS).graphs["training_module"]
    data, values = bundle.read(graph.file), bundle.read(graph.extra_files[0])
    batch = bundle.manifest.batch
    known = dict(zip([leaf.name for leaf in (*batch.inputs.leaves, *batch.targets.leaves)], leaves, strict=True))
    arguments = [known.get(spec.name, weights) for spec in graph.inputs]
    module = TrainingModule(_load_for_executorch_from_buffer(data, values))
    return lambda: (data, values, module.forward_backward("forward", arguments))


def head_step(path: Path) -> Callable[[], object]:
    from edgetrain.edge_client.training.selftest import on_features, read_self_test
    from edgetrain.protocol.bundle import Bundle

    bundle = Bundle(path)
    batch, weights = read_self_test(bundle)
    session = client_session(bundle, OURS, in_parts=True)
    head, batch = on_features(session, batch)
    session.release()
    reset_peak()
    parameters = bundle.initial_parameters()
    return lambda: head.step(parameters.copy(), batch, weights)


def bindings_step(path: Path) -> Callable[[], object]:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

    one_thread()
    data, arguments = step_arguments(path)
    module = _load_for_executorch_from_buffer(data)
    return lambda: (data, module.run_method("forward", arguments))


def step_arguments(path: Path) -> tuple[bytes, list[Any]]:
    """The program of the step, and what it is called with."""
    from edgetrain.protocol.bundle import Bundle

    bundle = Bundle(path)
    leaves, weights, parameters = tensors(path)
    graph = bundle.manifest.program(OURS).graphs["step"]
    names = [spec.name for spec in graph.inputs[len(parameters) : -1]]
    batch = bundle.manifest.batch
    known = dict(zip([leaf.name for leaf in (*batch.inputs.leaves, *batch.targets.leaves)], leaves, strict=True))
    return bundle.read(graph.file), [*parameters, *(known[name] for name in names), weights]


def print_table(measurements: list[Measurement]) -> None:
    print("| entry | contender | ms a step | x stock | x eager | peak MB | program kB | planned MB |")
    print("|---|---|---|---|---|---|---|---|")
    for m in measurements:
        stock = f"{m.times_stock:.1f}" if m.times_stock else "–"
        print(
            f"| {m.entry} | {m.contender} | {m.milliseconds:.2f} | {stock} | {m.times_eager:.2f} | "
            f"{m.peak_mb:.0f} | {m.program_bytes / 1e3:.0f} | {m.planned_bytes / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()

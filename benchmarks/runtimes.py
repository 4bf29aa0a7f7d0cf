"""Suite S: time and memory of one training step in every runtime, against eager torch in the same run.

    python benchmarks/runtimes.py                     # everything, twenty minutes or so
    python benchmarks/runtimes.py ds-cnn-full         # one entry
    python benchmarks/runtimes.py --part sizes        # steps, sizes, cache or memory alone

Contenders, each in a process of its own, take turns step by step: eager torch, onnxruntime (whole step), its head alone
(what is left of a step once features are cached), torch, and ort-training where its environment is there. Memory is
the peak resident set of a fresh process that only runs the session. The share of products is the time in matrix
products and convolutions by onnxruntime's own profiler.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from step_time import (  # type: ignore[import-not-found]
    EAGER,
    TRAINING_PYTHON,
    ask,
    eager_step,
    machine,
    peak_megabytes,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MICRO_BATCH = 8
WARM_UP = 3
# entry -> model, selection
SUITE = {
    "mobilenet-v2-last-4": ("mobilenet-v2", r"^features\.(1[6-9]|2)|^head"),
    "bert-tiny-last": ("bert-tiny", r"^blocks\.1|^pooler|^head"),
    "char-lm-last": ("char-lm", r"^blocks\.3|^norm|^head"),
    "char-lm-full": ("char-lm", "all"),
    "char-lm-lora": ("char-lm", "lora:r=8,target=attention"),
    "ds-cnn-full": ("ds-cnn", "all"),
    "resnet-8-full": ("resnet-8", "all"),
}
PARTIAL = ("mobilenet-v2-last-4", "bert-tiny-last", "char-lm-last", "char-lm-lora")
ONNX, HEAD, TORCH, TRAINING = "onnxruntime", "onnxruntime, head", "torch", "ort-training"
PRODUCTS = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul", "FusedMatMul", "FusedGemm"}


@dataclass(frozen=True)
class StepRow:
    entry: str
    contender: str
    # 0: as many as there are.
    threads: int
    milliseconds: float
    # How many times faster than eager torch.
    times_eager: float
    peak_mb: float
    bundle_bytes: int
    # Of onnxruntime, one thread.
    share_of_products: float | None


@dataclass(frozen=True)
class SizeRow:
    entry: str
    frozen: str
    program_bytes: int
    trunk_bytes: int
    # Float32 divided by this.
    times_smaller: float
    trunk_times_smaller: float
    loss_change: float
    milliseconds: float


@dataclass(frozen=True)
class CacheRow:
    entry: str
    # Of the same 256 samples.
    epoch_without_ms: float
    first_epoch_ms: float
    later_epoch_ms: float
    # Later epochs as a share of an epoch without the cache.
    share: float
    # Steps of the head alone on features in memory.
    head_alone_ms: float
    # Later epochs against the head alone right after them: the median.
    times_head_alone: float
    cache_bytes: int
    error: float
    client_peak_mb: float


@dataclass(frozen=True)
class AccumulationRow:
    entry: str
    peak_mb_batch_1: float
    peak_mb_64_times_1: float
    ratio: float
    # Of the gradient of 64 times 1 against that of one batch of 64, relative.
    difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("entries", nargs="*", default=list(SUITE), help=", ".join(SUITE))
    parser.add_argument("--part", choices=["all", "steps", "sizes", "cache", "memory"], default="all")
    parser.add_argument("--steps", type=int, default=20, help="of each contender")
    parser.add_argument("--runtime", nargs="+", default=[ONNX, TORCH, TRAINING], help="besides eager torch")
    parser.add_argument("--bundles", type=Path, help="folder of whole-step bundles by entry, to be used again")
    parser.add_argument("--all-threads", action=argparse.BooleanOptionalAction, default=True, help="besides one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        contend(arguments.contender, arguments.bundle, arguments.entries[0], arguments.threads)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "runtimes.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    record["machine"] = machine()
    for part, measure in (("steps", steps), ("sizes", sizes), ("cache", cache), ("memory", memory)):
        if arguments.part in ("all", part):
            for rows in measure(arguments):
                record[part] = replaced(record.get(part, []), [asdict(row) for row in rows])
                path.write_text(json.dumps(record, indent=2) + "\n")
                print_table(rows)
            if part == "steps":
                print_goals(record[part])


def replaced(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows measured before, but for those of the same entry (and contender and number of threads)."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["entry"], row.get("contender"), row.get("threads")

    measured = set(map(key, new))
    return [row for row in old if key(row) not in measured] + new


def export(entry: str, folder: Path, kept: Path | None = None, **options: Any) -> Path:
    from edgetrain.export import export_bundle
    from edgetrain.models import get_model

    model, trainable = SUITE.get(entry, (entry.partition(":")[0], entry.partition(":")[2]))
    if kept is not None and (kept / entry).exists():
        return kept / entry
    folder = folder if kept is None else kept / entry
    print(f"exporting {entry} {options or ''} …", file=sys.stderr)
    batch = options.pop("micro_batch", MICRO_BATCH)
    source = get_model(model, batch_size=max(batch, 2))
    if options.pop("used", False):
        use(source.module)
    return export_bundle(*source, trainable=trainable, micro_batch=batch, out=folder, name=model, **options)


def use(module: Any) -> None:
    """Statistics and shifts as after training: those of a fresh model are zeros, which are dropped."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias.data):
                tensor.normal_(0, 0.3, generator=generator)  # type: ignore[union-attr]


def steps(arguments: argparse.Namespace) -> Iterator[list[StepRow]]:
    runtimes = tuple(name for name in arguments.runtime if name != TRAINING or TRAINING_PYTHON.exists())
    for entry in arguments.entries:
        with tempfile.TemporaryDirectory() as name:
            path = export(entry, Path(name) / "bundle", arguments.bundles, runtimes=runtimes)
            for threads in (1, 0) if arguments.all_threads else (1,):
                yield race(entry, path, runtimes, threads, arguments.steps)


def race(entry: str, path: Path, runtimes: tuple[str, ...], threads: int, count: int) -> list[StepRow]:
    from edgetrain.protocol.bundle import Bundle

    manifest = Bundle(path).manifest
    split = "trunk" in manifest.program(ONNX).graphs
    contenders = (EAGER, *runtimes, *((HEAD,) if split else ()))
    processes = {name: start(name, path, entry, threads) for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, process in processes.items():
            times[name].append(ask(process, "step"))
    peaks = {name: ask(process, "peak") for name, process in processes.items()}
    share = ask(processes[ONNX], "share") if threads == 1 else None
    for process in processes.values():
        process.communicate("stop\n")
    medians = {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}
    return [
        StepRow(
            entry=entry,
            contender=name,
            threads=threads,
            milliseconds=round(1000 * median, 2),
            times_eager=round(medians[EAGER] / median, 2),
            peak_mb=round(peaks[name], 1),
            bundle_bytes=0 if name == EAGER else sum(e.size for e in manifest.files(name.partition(",")[0])),
            share_of_products=round(share, 2) if name == ONNX and share is not None else None,
        )
        for name, median in medians.items()
    ]


def start(contender: str, bundle: Path, entry: str, threads: int) -> subprocess.Popen[str]:
    python = str(TRAINING_PYTHON) if contender == TRAINING else sys.executable
    command = [python, __file__, entry, "--contender", contender, "--bundle", str(bundle), "--threads", str(threads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def contend(contender: str, bundle: Path, entry: str, threads: int) -> None:
    """The process of one contender: answers on its standard output."""
    if contender in PROGRAMS:
        print(json.dumps(PROGRAMS[contender](bundle)), flush=True)
        return
    step = eager(bundle, entry, threads) if contender == EAGER else session(bundle, contender, threads)
    for line in sys.stdin:
        if line.strip() == "step":
            begin = time.perf_counter()
            step()
            print(time.perf_counter() - begin, flush=True)
        elif line.strip() == "peak":
            print(peak_megabytes(), flush=True)
        elif line.strip() == "share":
            print(share_of_products(bundle), flush=True)
        else:
            return


def eager(bundle: Path, entry: str, threads: int) -> Callable[[], object]:
    import torch

    model, trainable = SUITE[entry]
    cores = os.cpu_count() or 1
    adapters = trainable.startswith("lora")
    step = eager_adapters(bundle, model, trainable) if adapters else eager_step(bundle, model)
    torch.set_num_threads(threads or cores)
    return step


def eager_adapters(bundle: Path, model: str, trainable: str) -> Callable[[], object]:
    """Eager torch on the module with its adapters."""
    import torch

    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.export.prepare import prepare
    from edgetrain.models import get_model
    from edgetrain.protocol.bundle import Bundle

    source = get_model(model, batch_size=MICRO_BATCH)
    prepared = prepare(source.module, trainable)
    for name, parameter in prepared.module.named_parameters():
        parameter.requires_grad_(name in prepared.trainable)
    (inputs, targets), weights = read_self_test(Bundle(bundle))
    x, y, w = (torch.from_numpy(array) for array in (inputs, targets, weights))  # type: ignore[arg-type]

    def step() -> None:
        prepared.module.zero_grad(set_to_none=True)
        (source.loss(prepared.module(x), y) * w).sum().backward()

    return step


def session(path: Path, contender: str, threads: int) -> Callable[[], object]:
    from edgetrain.edge_client import open_session
    from edgetrain.edge_client.training.selftest import on_features, read_self_test
    from edgetrain.protocol.bundle import Bundle

    bundle = Bundle(path)
    opened = open_session(bundle, contender.partition(",")[0], threads=threads)
    batch, weights = read_self_test(bundle)
    parameters = bundle.initial_parameters()
    if contender == HEAD:
        opened, batch = on_features(opened, batch)
    # The same vector each time: training changes it in place.
    return lambda: opened.step(parameters, batch, weights)


def share_of_products(path: Path) -> float:
    """Time in products of all kernel time, by onnxruntime's profiler."""
    from edgetrain.edge_client.runtimes import onnxruntime as runtime

    plain = runtime.session_options
    with tempfile.TemporaryDirectory() as folder:

        def profiled(threads: int) -> Any:
            options = plain(threads)
            options.enable_profiling = True
            options.profile_file_prefix = f"{folder}/profile"
            return options

        runtime.session_options = profiled
        step = session(path, ONNX, 1)
        for _ in range(10):
            step()
        opened = step.__closure__[1].cell_contents  # type: ignore[index]
        for cell in step.__closure__ or ():
            if hasattr(cell.cell_contents, "_bound"):
                opened = cell.cell_contents
        file = opened._bound["step"][0]._session.end_profiling()  # noqa: SLF001
        events = json.loads(Path(file).read_text())
    total = products = 0
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            total += event["dur"]
            products += event["dur"] if event["args"]["op_name"] in PRODUCTS else 0
    return products / total


def sizes(arguments: argparse.Namespace) -> Iterator[list[SizeRow]]:
    from edgetrain.export import Storage
    from edgetrain.export.errors import ExportError

    for entry in ("mobilenet-v2:head", *arguments.entries):
        if entry not in (*PARTIAL, "mobilenet-v2:head"):
            continue
        rows = []
        with tempfile.TemporaryDirectory() as name:
            for kind in ("float16", "int8", "int8-static"):
                try:
                    path = export(entry, Path(name) / kind, storage=Storage(kind=kind), used=True)
                except ExportError as error:
                    print(f"{entry} {kind}: {error}", file=sys.stderr)
                    continue
                rows.append(size_row(entry, kind, path, arguments.steps))
        yield rows


def size_row(entry: str, kind: str, path: Path, count: int) -> SizeRow:
    from edgetrain.protocol.bundle import Bundle

    report = Bundle(path).manifest.programs[0].storage
    assert report is not None
    step = session(path, ONNX, 1)
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return SizeRow(
        entry=entry,
        frozen=kind,
        program_bytes=report.bytes_after,
        trunk_bytes=report.trunk_bytes_after,
        times_smaller=round(report.bytes_before / report.bytes_after, 2),
        trunk_times_smaller=round(report.trunk_bytes_before / max(report.trunk_bytes_after, 1), 2),
        loss_change=round(abs(report.loss_after / report.loss_before - 1), 6),
        milliseconds=round(1000 * statistics.median(times[WARM_UP:]), 2),
    )


def cache(arguments: argparse.Namespace) -> Iterator[list[CacheRow]]:
    for entry in ("mobilenet-v2:head", "mobilenet-v2-last-4"):
        if entry != "mobilenet-v2:head" and entry not in arguments.entries:
            continue
        with tempfile.TemporaryDirectory() as name:
            path = export(entry, Path(name) / "bundle", arguments.bundles)
            yield [CacheRow(entry=entry, **ask_once("cached epochs", path))]


def ask_once(program: str, bundle: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "-", "--contender", program, "--bundle", str(bundle)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def cached_epochs(path: Path) -> dict[str, float]:
    """Epochs over 256 samples without and with the cache, as a client runs them, on one thread.

    In time of the processor: what others do on this machine does not count.
    """
    import gc

    import numpy as np

    from edgetrain.edge_client import open_session
    from edgetrain.edge_client.host.memory import return_what_is_freed
    from edgetrain.edge_client.training.dataset import Dataset
    from edgetrain.edge_client.training.feature_cache import cache_features
    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.edge_client.training.trainer import train
    from edgetrain.protocol.bundle import Bundle
    from edgetrain.protocol.training import TrainingConfig

    return_what_is_freed()
    bundle = Bundle(path)
    (x, y), _ = read_self_test(bundle)
    data = Dataset(x, y).select(np.tile(np.arange(len(y)), 256 // len(y)))
    training = TrainingConfig(epochs=1, batch_size=MICRO_BATCH, learning_rate=0.01)
    start_at = bundle.initial_parameters()

    def epoch(on: Any, dataset: Dataset) -> float:
        begin = time.process_time()
        train(on, start_at, dataset, training, seed=0)
        return 1000 * (time.process_time() - begin)

    with tempfile.TemporaryDirectory() as folder:
        opened = open_session(bundle, ONNX)
        opened.save_memory(in_parts=True)
        begin = time.process_time()
        cached = cache_features(
            opened, data, Path(folder) / "f", bundle=bundle.digest, precision="float16", max_bytes=1 << 30
        )
        opened.release()
        head = opened.head()
        first = 1000 * (time.process_time() - begin) + epoch(head, cached.dataset)
        peak = peak_megabytes()
        without, later, alone = [], [], []
        part, _ = cached.dataset.take(np.arange(MICRO_BATCH))
        whole = open_session(bundle, ONNX)
        for _ in range(20):
            gc.collect()
            without.append(epoch(whole, data))
            later.append(epoch(head, cached.dataset))
            begin = time.process_time()
            for _ in range(len(data) // MICRO_BATCH):
                head.step(start_at, part)  # type: ignore[union-attr]
            alone.append(1000 * (time.process_time() - begin))
    # The quickest of twenty: others still take the caches away.
    plain, fast, bare = (min(found) for found in (without, later, alone))
    ratios = [epoch_ms / head_ms for epoch_ms, head_ms in zip(later, alone, strict=True)]
    return {
        "epoch_without_ms": round(plain, 2),
        "first_epoch_ms": round(first, 2),
        "later_epoch_ms": round(fast, 2),
        "share": round(fast / plain, 4),
        "head_alone_ms": round(bare, 2),
        "times_head_alone": round(statistics.median(ratios), 3),
        "cache_bytes": cached.size,
        "error": cached.error,
        "client_peak_mb": round(peak, 1),
    }


def memory(arguments: argparse.Namespace) -> Iterator[list[AccumulationRow]]:
    """A batch of 64 as 64 micro-batches of 1, against a batch of 1 and one of 64."""
    for entry in ("char-lm-last",):
        if entry not in arguments.entries:
            continue
        with tempfile.TemporaryDirectory() as name:
            one = export(entry, Path(name) / "one", micro_batch=1, split=False)
            many = export(entry, Path(name) / "many", micro_batch=64, split=False)
            (Path(name) / "one" / "batch").symlink_to(many)
            single, accumulated = ask_once("batch of 1", one), ask_once("64 times 1", one)
            row = AccumulationRow(
                entry=entry,
                peak_mb_batch_1=single["peak"],
                peak_mb_64_times_1=accumulated["peak"],
                ratio=round(accumulated["peak"] / single["peak"], 3),
                difference=accumulated["difference"],
            )
            yield [row]


def accumulate(path: Path, times: int) -> dict[str, float]:
    import numpy as np

    from edgetrain.edge_client import open_session
    from edgetrain.edge_client.training.dataset import Dataset
    from edgetrain.edge_client.training.selftest import read_self_test
    from edgetrain.edge_client.training.trainer import train
    from edgetrain.protocol.bundle import Bundle
    from edgetrain.protocol.training import TrainingConfig

    bundle, whole = Bundle(path), Bundle(path / "batch")
    (inputs, targets), weights = read_self_test(whole)
    data = Dataset(inputs, targets, weights)
    opened = open_session(bundle, ONNX)
    start_at = bundle.initial_parameters()
    data = data if times == 64 else data.subset(np.arange(times))
    # A large step, so that the parameters' own rounding does not count.
    rate = 1024.0
    training = TrainingConfig(
        epochs=8 if times == 1 else 1, batch_size=times, learning_rate=rate if times > 1 else 0.01
    )
    moved = train(opened, start_at, data, training, seed=0).parameters
    peak = round(peak_megabytes(), 1)
    if times == 1:
        return {"peak": peak, "difference": 0.0}
    large = open_session(whole, ONNX).step(start_at, (inputs, targets), weights)
    expected = large.gradients / np.float32(large.weight_sum)
    difference = np.abs((start_at - moved) / np.float32(rate) - expected).max() / np.abs(expected).max()
    return {"peak": peak, "difference": float(difference)}


PROGRAMS: dict[str, Callable[[Path], dict[str, float]]] = {
    "cached epochs": cached_epochs,
    "batch of 1": lambda path: accumulate(path, 1),
    "64 times 1": lambda path: accumulate(path, 64),
}


def print_table(rows: list[Any]) -> None:
    if not rows:
        return
    names = list(asdict(rows[0]))
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join("–" if value is None else str(value) for value in asdict(row).values()) + " |")
    print(flush=True)


def print_goals(rows: list[dict[str, Any]]) -> None:
    for threads in (1, 0):
        found = {r["entry"]: r["times_eager"] for r in rows if r["contender"] == ONNX and r["threads"] == threads}
        partial = [found[entry] for entry in PARTIAL if entry in found]
        if partial:
            mean = math.exp(statistics.fmean(map(math.log, partial)))
            print(
                f"{'one thread' if threads else 'all threads'}: partial entries, geometric mean: {mean:.2f} times "
                f"eager (goal 1.5); slowest entry {min(found.values()):.2f} (goal 1.0)"
            )


if __name__ == "__main__":
    main()

"""Every model with every selection on every runtime: gradient errors against eager torch, and sizes.

    python benchmarks/model_table.py [--model NAME …] [--runtime NAME …]

Exports each combination, which compares every element of every gradient with eager torch, and runs the bundle's
self-test through the session of each runtime that is installed here. What was asked for replaces its rows in
benchmarks/results/model_table.json; docs/model-table.md is written from all of them. A combination that cannot be
exported is listed with the reason.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from pathlib import Path

import msgspec

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.training.selftest import run_self_test
from edgetrain.export import export_bundle, load_source
from edgetrain.export.errors import SelectionError
from edgetrain.protocol import EdgetrainError
from edgetrain.protocol.bundle import Bundle

# A neighbour has the name of the package executorch: from here on only the package is found.
sys.path.remove(str(Path(__file__).resolve().parent))

ROWS = Path(__file__).parent / "results" / "model_table.json"
OUT = Path(__file__).parent.parent / "docs" / "model-table.md"
MODELS = ("digits-cnn", "ds-cnn", "resnet-8", "mobilenet-v2", "char-lm", "bert-tiny", "vit-tiny", "seq2seq")
SELECTIONS = (
    "all",
    "last:2",
    "bias",
    "norm",
    "head",
    "lora:r=4,alpha=8,target=.*",
    "sparse:fraction=0.5,dim=out,target=.*",
)
RUNTIMES = ("onnxruntime", "ort-training", "torch", "executorch")
BATCH = 4


class Proofs(logging.Handler):
    """The gradient errors that the exporter's proof logs, by runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"(\S+): largest gradient error (\S+)", record.getMessage()):
            self.errors[found[1]] = found[2]


PROOFS = Proofs()


class Row(msgspec.Struct):
    """One combination; sizes in KiB."""

    model: str
    selection: str
    runtime: str
    trainable: int = 0
    total: int = 0
    size: float = 0.0
    error: str = ""
    verdict: str = ""
    # Why it cannot be exported.
    reason: str = ""

    @property
    def key(self) -> tuple[int, int, int]:
        return MODELS.index(self.model), SELECTIONS.index(self.selection), RUNTIMES.index(self.runtime)


def measure(model: str, selection: str, runtimes: list[str], directory: Path) -> list[Row]:
    source = load_source(model, options={"batch_size": BATCH})
    out = directory / f"{model}-{selection.split(':', maxsplit=1)[0]}.edge"
    rows = [Row(model, selection, runtime) for runtime in runtimes]
    try:
        export_bundle(*source, trainable=selection, runtimes=runtimes, out=out)
    except EdgetrainError as error:
        if len(runtimes) == 1 or isinstance(error, SelectionError):
            for row in rows:
                row.reason = str(error).splitlines()[0].split(". Possible:")[0]
            return rows
        return [row for runtime in runtimes for row in measure(model, selection, [runtime], directory)]
    bundle = Bundle(out)
    manifest = bundle.manifest
    for row in rows:
        row.trainable, row.total = manifest.num_parameters, manifest.num_parameters + manifest.frozen.elements
        row.size = round(sum(entry.size for entry in manifest.files(row.runtime)) / 1024, 1)
        row.error = PROOFS.errors[row.runtime]
        row.verdict = "proven at export"
        if row.runtime in available_runtimes():
            report = run_self_test(bundle, open_session(bundle, row.runtime))
            row.verdict = "ok" if report.ok else "self-test WRONG"
    return rows


def document(rows: list[Row]) -> str:
    lines = [
        "# Models, selections, runtimes",
        "",
        f"Written by `python benchmarks/model_table.py`; batch {BATCH}. Per runtime: what a device downloads, in KiB,",
        "and the exporter's proof: the largest difference to eager torch of any element of any gradient, as a share of",
        "the largest element of that parameter's gradient. The self-test passed through the session, too, but for",
        "ort-training, which needs an environment of its own (`scripts/test` runs the sessions there).",
        "",
        "| model | selection | trainable | " + " | ".join(RUNTIMES) + " |",
        "|---|---|---|" + "---|" * len(RUNTIMES),
    ]
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.selection), {})[row.runtime] = row
    for (model, selection), cells in groups.items():
        done = [row for row in cells.values() if not row.reason]
        if not done:
            lines.append(f"| {model} | `{selection}` | {next(iter(cells.values())).reason} |" + " |" * len(RUNTIMES))
            continue
        texts = [cell(cells[runtime]) if runtime in cells else "–" for runtime in RUNTIMES]
        share = f"{done[0].trainable:,} of {done[0].total:,}"
        lines.append(f"| {model} | `{selection}` | {share} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def cell(row: Row) -> str:
    if row.reason:
        return row.reason
    wrong = " self-test WRONG" if row.verdict.endswith("WRONG") else ""
    return f"{row.size:,.0f}, {row.error}{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="default: onnxruntime and torch")
    arguments = parser.parse_args()
    logger = logging.getLogger("edgetrain.export")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(PROOFS)
    runtimes = arguments.runtime or ["onnxruntime", "torch"]
    known: dict[tuple[int, int, int], Row] = {}
    if ROWS.exists():
        known = {row.key: row for row in msgspec.json.decode(ROWS.read_bytes(), type=list[Row])}
    with tempfile.TemporaryDirectory() as directory:
        for model in arguments.model or MODELS:
            for selection in SELECTIONS:
                for row in measure(model, selection, runtimes, Path(directory)):
                    print(model, selection, row.runtime, row.reason or cell(row), row.verdict, flush=True)
                    known[row.key] = row
            rows = [known[key] for key in sorted(known)]
            ROWS.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")
            OUT.write_text(document(rows))


if __name__ == "__main__":
    main()

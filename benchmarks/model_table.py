"""Every model with every selection on every runtime: gradient errors against eager torch, and sizes.

    python benchmarks/model_table.py [--model NAME] [--runtime NAME]

Exports each combination, which compares every element of every gradient with eager torch, runs the bundle's
self-test through the session of each runtime that is installed here, and writes
docs/model-table.md. A combination that cannot be exported is listed with the reason.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from pathlib import Path

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.selftest import run_self_test
from edgetrain.export import export_bundle, load_source
from edgetrain.protocol import EdgetrainError
from edgetrain.protocol.bundle import Bundle

# A neighbour has the name of the package executorch: from here on only the package is found.
sys.path.remove(str(Path(__file__).resolve().parent))

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


def measure(model: str, selection: str, runtimes: list[str], directory: Path) -> list[str]:
    source = load_source(model, options={"batch_size": BATCH})
    out = directory / f"{model}-{selection.split(':', maxsplit=1)[0]}.edge"
    try:
        export_bundle(*source, trainable=selection, runtimes=runtimes, out=out)
    except EdgetrainError as error:
        if len(runtimes) == 1:
            return [f"| {model} | `{selection}` | {runtimes[0]} | – | – | – | {str(error).splitlines()[0]} |"]
        return [row for runtime in runtimes for row in measure(model, selection, [runtime], directory)]
    bundle = Bundle(out)
    manifest = bundle.manifest
    rows = []
    for runtime in runtimes:
        size = sum(entry.size for entry in manifest.files(runtime))
        total = manifest.num_parameters + manifest.frozen.elements
        share = f"{manifest.num_parameters:,} of {total:,}"
        if runtime in available_runtimes():
            report = run_self_test(bundle, open_session(bundle, runtime))
            verdict = "ok" if report.ok else "self-test WRONG"
        else:
            verdict = "proven at export"
        error = PROOFS.errors.get(runtime, "–")
        rows.append(f"| {model} | `{selection}` | {runtime} | {share} | {size / 1024:,.0f} | {error} | {verdict} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--runtime", action="append", help="default: onnxruntime and torch")
    arguments = parser.parse_args()
    logger = logging.getLogger("edgetrain.export")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(PROOFS)
    runtimes = arguments.runtime or ["onnxruntime", "torch"]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for model in arguments.model or MODELS:
            for selection in SELECTIONS:
                for row in measure(model, selection, runtimes, Path(directory)):
                    print(row, flush=True)
                    rows.append(row)
    if not arguments.model:
        OUT.write_text(
            "# Models, selections, runtimes\n\n"
            f"Written by `python benchmarks/model_table.py`; batch {BATCH}. The gradient error is the "
            "exporter's proof: the largest difference to eager torch of any element of any gradient, as a share of the "
            'largest element of that gradient. The size is what a device of that runtime downloads; "ok" says that '
            "the bundle's self-test passed through the session, too (a runtime needs its own environment for that).\n\n"
            "| model | selection | runtime | trainable | KiB | gradient error | |\n|---|---|---|---|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )


if __name__ == "__main__":
    main()

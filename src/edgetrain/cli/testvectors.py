"""`edgetrain testvectors`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import numpy as np

# Default settings of a federation, and what the simplest implementation sends.
CODECS = ("topk:0.05|int8:block=256|rice", "int8:block=256|packed", "dense|float32")
SEED = 20260101
LEARNING_RATE = 0.1
FORMAT = "edgetrain-testvectors"


@click.command("testvectors")
@click.argument("bundle", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--runtime", help="Runtime that computes. [default: the first of the bundle's that is here]")
def command(bundle: Path | None, out: Path, runtime: str | None) -> None:
    """Write what another implementation needs to check itself: an app in Kotlin, Swift, C or JavaScript.

    A bundle, the inputs of its step in order, the outputs, one SGD step, and the bytes of the update. Without
    BUNDLE, digits-cnn is exported for executorch and onnxruntime.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise click.UsageError(f"{out} is there already; choose another -o")
    out.mkdir(parents=True, exist_ok=True)
    copied = out / "bundle"
    if bundle is None:
        _export(copied)
    else:
        _unpack(bundle, copied)
    write(copied, out, runtime)
    click.echo(f"{out}: vectors.json says what each file holds")


def _export(out: Path) -> None:
    from edgetrain.export import export_bundle, load_source

    source = load_source("digits-cnn")
    export_bundle(*source, runtimes=("executorch", "onnxruntime"), out=out, name="digits-cnn")


def _unpack(bundle: Path, out: Path) -> None:
    """A directory, as an app would hold it."""
    from edgetrain.protocol.bundle import Bundle, write_bundle

    opened = Bundle(bundle)
    if bundle.is_dir():
        opened.verify_files()
        shutil.copytree(bundle, out)
        return
    files = {entry.file: opened.read(entry) for entry in opened.manifest.files()}
    write_bundle(out, opened.manifest, files)


def write(bundle: Path, out: Path, runtime: str | None = None) -> None:
    """Computes and writes everything but the bundle.

    Raises:
        SessionError: the bundle does not run here, or its self-test fails.
    """
    from edgetrain.edge_client.runtimes import open_session
    from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
    from edgetrain.protocol import encode
    from edgetrain.protocol.bundle import Bundle

    opened = Bundle(bundle)
    manifest = opened.manifest
    session = open_session(opened, runtime)
    run_self_test(opened, session).raise_if_wrong()
    batch, weights = read_self_test(opened)
    parameters = opened.initial_parameters()
    result = session.step(parameters, batch, weights)
    gradients = result.gradients.copy()
    delta = (np.float32(-LEARNING_RATE) * (gradients / np.float32(result.weight_sum))).astype(np.float32)
    offsets = [entry.offset for entry in manifest.parameters]
    files = {
        "parameters.f32": parameters.astype("<f4").tobytes(),
        "gradients.f32": gradients.astype("<f4").tobytes(),
        "delta.f32": delta.astype("<f4").tobytes(),
    }
    updates = []
    for number, codec in enumerate(CODECS):
        name = f"update-{number}.bin"
        files[name] = encode(delta, codec, seed=SEED, offsets=offsets)
        updates.append({"codec": codec, "seed": str(SEED), "file": name, "bytes": len(files[name])})
    for name, data in files.items():
        (out / name).write_bytes(data)
    description = {
        "format": FORMAT,
        "version": 1,
        "bundle": "bundle",
        "digest": opened.digest.hex(),
        "computed_by": session.runtime,
        # All files are little-endian, float32 unless the manifest says otherwise.
        "batch": manifest.self_test.file.file,
        "expected": {
            "loss_sum": result.loss_sum,
            "weight_sum": result.weight_sum,
            "metrics": {name: value.ravel().tolist() for name, value in result.metrics.items()},
            "gradients": "gradients.f32",
            "relative_tolerance": 1e-4,
        },
        "sgd_step": {"learning_rate": LEARNING_RATE, "delta": "delta.f32"},
        "offsets": offsets,
        "updates": updates,
    }
    (out / "vectors.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

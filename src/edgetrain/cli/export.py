"""`edgetrain export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from edgetrain.cli.options import factory_options


@click.command("export")
@click.argument("model")
@click.option("-o", "--out", help="Where the bundle goes: a directory, or FILE.edge. [default: MODEL.edge]")
@click.option(
    "--trainable",
    default="all",
    show_default=True,
    help="What learns: all, last:K, bias, norm, head, a regular expression, lora:…, sparse:… (docs/export.md).",
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    help="Runtime to lower to; repeat for several. [default: onnxruntime]",
)
@click.option("--micro-batch", type=click.IntRange(min=1), help="Samples per step. [default: the example batch's]")
@click.option("--per-sample-clipping", is_flag=True, help="Add the step that differential privacy needs.")
@click.option("--split/--no-split", default=True, help="Add the frozen part as a program of its own. [default: split]")
@click.option(
    "--frozen",
    type=click.Choice(["float32", "float16", "int8", "int8-static", "int8-dynamic"]),
    default="float32",
    show_default=True,
    help="How frozen weights are stored (docs/small-and-fast.md).",
)
@click.option(
    "--trainable-storage",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="How weights that learn are kept, in the bundle and on the device (docs/small-and-fast.md).",
)
@click.option(
    "--calibration",
    help="Data to measure int8 ranges and the loss change on: an .npz, a .csv, or file.py:callable. "
    "[default: the example batch]",
)
@click.option(
    "--max-loss-change",
    type=click.FloatRange(min=0, min_open=True),
    default=0.05,
    show_default=True,
    help="Fail if storing changes the loss on the calibration data by a larger share.",
)
@click.option(
    "--executorch-style",
    type=click.Choice(["functional", "training-module"]),
    default="functional",
    show_default=True,
    help="training-module adds a program (.pte, .ptd) for ExecuTorch's own TrainingModule (docs/executorch.md).",
)
@click.option("--name", help="Name of the bundle. [default: MODEL]")
@click.option("--task", help="For hf: models: classification, causal-lm, masked-lm or image-classification.")
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of the model's factory; repeatable.",
)
def command(
    model: str,
    out: str | None,
    trainable: str,
    runtimes: tuple[str, ...],
    micro_batch: int | None,
    *,
    per_sample_clipping: bool,
    split: bool,
    frozen: str,
    trainable_storage: str,
    calibration: str | None,
    max_loss_change: float,
    executorch_style: str,
    name: str | None,
    task: str | None,
    options: tuple[str, ...],
) -> None:
    """Export MODEL with its training step, prove the gradients, and write a bundle.

    MODEL is a registered name (digits-cnn), or path/to/file.py:function, where the function returns
    (module, loss, example_batch), or hf:PATH_OR_CONFIG for a model of the transformers library.
    """
    from edgetrain.edge_client.training.data import load_samples
    from edgetrain.export import Storage, export_bundle, load_source
    from edgetrain.export.batch import as_tensors, batch_spec
    from edgetrain.export.lowering import get_lowering
    from edgetrain.protocol.bundle import Bundle

    # Before any work: whether it can be done at all.
    storage = Storage(kind=frozen, trainable=trainable_storage, max_loss_change=max_loss_change)
    runtimes = tuple(dict.fromkeys(runtimes)) or ("onnxruntime",)
    storage.check([get_lowering(runtime) for runtime in runtimes])
    if per_sample_clipping:
        storage.check_clipping()
    source = load_source(model, task=task, options=factory_options(options))
    if calibration is not None:
        samples = load_samples(calibration, batch_spec(source.example_batch))
        storage = replace(storage, calibration=as_tensors((samples.inputs, samples.targets)))
    title = name or _title(model)
    path = export_bundle(
        source.module,
        source.loss,
        source.example_batch,
        trainable=trainable,
        runtimes=runtimes,
        micro_batch=micro_batch,
        per_sample_clipping=per_sample_clipping,
        split=split,
        storage=storage,
        executorch_style=executorch_style,
        out=out or f"{title}.edge",
        name=title,
    )
    bundle = Bundle(path)
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files())
    if report := manifest.programs[0].storage:
        click.echo(
            f"frozen weights as {report.kind}: {report.bytes_before:,} -> {report.bytes_after:,} bytes, mean loss "
            f"{report.loss_before:.5g} -> {report.loss_after:.5g} on {report.calibration_samples} samples"
        )
    if kept := manifest.trainable_storage:
        click.echo(
            f"trainable weights as {kept.kind}: {kept.bytes_before:,} -> {kept.bytes_after:,} bytes, mean loss "
            f"{kept.loss_before:.5g} -> {kept.loss_after:.5g} on {kept.calibration_samples} samples"
        )
    click.echo(
        f"{path}: {manifest.num_parameters:,} trainable parameters in {len(manifest.parameters)} tensors, "
        f"{manifest.frozen.elements:,} frozen, for {', '.join(program.runtime for program in manifest.programs)}, "
        f"{size / 1024:,.0f} KiB; gradients proven against eager torch"
    )


def _title(model: str) -> str:
    if ".py:" in model:
        path, _, function = model.rpartition(":")
        return f"{Path(path).stem}-{function}"
    return Path(model.removeprefix("hf:")).name or "model"

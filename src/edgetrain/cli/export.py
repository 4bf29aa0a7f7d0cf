"""`edgetrain export`."""

from __future__ import annotations

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
    name: str | None,
    task: str | None,
    options: tuple[str, ...],
) -> None:
    """Export MODEL with its training step, prove the gradients, and write a bundle.

    MODEL is a registered name (digits-cnn), or path/to/file.py:function, where the function returns
    (module, loss, example_batch), or hf:PATH_OR_CONFIG for a model of the transformers library.
    """
    from edgetrain.export import export_bundle, load_source
    from edgetrain.protocol.bundle import Bundle

    source = load_source(model, task=task, options=factory_options(options))
    title = name or _title(model)
    path = export_bundle(
        source.module,
        source.loss,
        source.example_batch,
        trainable=trainable,
        runtimes=runtimes or ("onnxruntime",),
        micro_batch=micro_batch,
        per_sample_clipping=per_sample_clipping,
        split=split,
        out=out or f"{title}.edge",
        name=title,
    )
    bundle = Bundle(path)
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files())
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

"""`edgetrain merge`."""

from __future__ import annotations

import click

from edgetrain.cli.options import factory_options


@click.command("merge")
@click.argument("bundle")
@click.argument("parameters")
@click.option("-o", "--out", required=True, help="FILE.onnx, or FILE.pt for the module's state_dict.")
@click.option("--model", help="For .pt: the model that was exported, named as for `edgetrain export`.")
@click.option("--task", help="For .pt and hf: models: the task.")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="Argument of the model's factory.")
def command(
    bundle: str, parameters: str, out: str, model: str | None, task: str | None, options: tuple[str, ...]
) -> None:
    """Write an ordinary inference model from BUNDLE and trained PARAMETERS.

    PARAMETERS is a run's parameters.safetensors, an .npy, or raw float32. Adapters are merged into the weights.
    """
    from edgetrain.export import load_source, merge

    module = None
    if model:
        module = load_source(model, task=task, options=factory_options(options)).module
    path = merge(bundle, parameters, out, module=module)
    click.echo(f"{path}: {path.stat().st_size / 1024:,.0f} KiB; its outputs equal the bundle's")

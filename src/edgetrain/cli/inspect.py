"""`edgetrain inspect`."""

from __future__ import annotations

from collections.abc import Sequence

import click


@click.command("inspect")
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def command(bundle: str, *, as_json: bool) -> None:
    """Show what BUNDLE holds: graphs, sizes, parameters, the trainable share, hashes."""
    from edgetrain.protocol.bundle import Bundle

    opened = Bundle(bundle)
    if as_json:
        click.echo(opened.manifest_bytes.decode(), nl=False)
        return
    opened.verify_files()
    manifest = opened.manifest
    trainable, frozen = manifest.num_parameters, manifest.frozen.elements
    click.echo(f"{manifest.name}  ({opened.path})")
    click.echo(f"  digest        {opened.digest.hex()}")
    click.echo(f"  written by    {manifest.producer}, format {'.'.join(map(str, manifest.format_version))}")
    click.echo(
        f"  trainable     {trainable:,} of {trainable + frozen:,} parameters "
        f"({trainable / max(1, trainable + frozen):.1%}), selected by {manifest.trainable!r}"
    )
    click.echo(f"  loss          {manifest.loss}; metrics: {', '.join(manifest.metrics) or 'none'}")
    click.echo(f"  micro-batch   {manifest.micro_batch}")
    for half in (manifest.batch.inputs, manifest.batch.targets):
        for leaf in half.leaves:
            click.echo(f"  {leaf.name:<13} {leaf.dtype} {list(leaf.shape)}")
    click.echo("\ngraphs")
    graphs = [
        (
            program.runtime,
            name,
            f"{graph.file.size + sum(extra.size for extra in graph.extra_files):,}",
            graph.file.file,
            graph.file.sha256[:16],
        )
        for program in manifest.programs
        for name, graph in program.graphs.items()
    ]
    _table(("runtime", "graph", "bytes", "file", "sha256"), graphs, right={2})
    click.echo("\ntrainable parameters")
    rows = [
        (entry.name, "x".join(map(str, entry.shape)) or "scalar", entry.dtype, f"{entry.numel:,}", f"{entry.offset:,}")
        for entry in manifest.parameters
    ]
    _table(("name", "shape", "kept as", "elements", "offset"), rows, right={3, 4})
    click.echo("\nall files are whole: sizes and SHA-256 agree with the manifest")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: set[int]) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo(f"  {'  '.join(cells)}".rstrip())

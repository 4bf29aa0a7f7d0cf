"""`edgetrain build-runtime`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("build-runtime")
@click.argument("runtime", type=click.Choice(["executorch"]))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The library. [default: the user's cache]")
@click.option("--compiler", help="C++ compiler, e.g. aarch64-linux-gnu-g++. [default: $CXX, c++, g++ or clang++]")
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directory `executorch` of an unpacked wheel, e.g. another platform's. [default: the installed one]",
)
def command(runtime: str, out: Path | None, compiler: str | None, wheel: Path | None) -> None:
    """Compile what RUNTIME needs on this machine, or for another one.

    For executorch: the small library between Python and the libraries of the executorch wheel, so that it runs
    without torch. Done by itself when first needed, if there is a compiler.
    """
    from edgetrain.edge_client.runtimes.executorch_build import Wheel, build, check_wheel, find_wheel

    del runtime
    if wheel is not None and out is None:
        raise click.UsageError("--wheel is for another machine: say with -o where the library goes")
    found = find_wheel() if wheel is None else check_wheel(Wheel(wheel, "(unpacked)"))
    click.echo(str(build(found, compiler=compiler, out=out)))

"""`edgetrain runs`: what there is in run directories, and a word with the coordinators in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgetrain.protocol.errors import ConfigError

if TYPE_CHECKING:
    from edgetrain.coordinator.run.past_run import PastRun


@click.group("runs")
def command() -> None:
    """List, show, plot, pause, resume and stop runs.

    A run is a directory that `edgetrain coordinator` writes, the `out` of its settings.
    """


@command.command("list")
@click.argument("directory", type=click.Path(), default=".")
def list_runs(directory: str) -> None:
    """List the runs in DIRECTORY and below."""
    from rich.console import Console
    from rich.table import Table

    from edgetrain.coordinator.run.past_run import find_runs

    runs = find_runs(Path(directory))
    if not runs:
        raise ConfigError(f"{directory}: holds no run")
    table = Table()
    for name in ("run", "federation", "status", "strategy", "rounds", "accuracy", "loss"):
        justify: Literal["left", "right"] = "right" if name in {"rounds", "accuracy", "loss"} else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for run in runs:
        last = run.records[-1] if run.records else None
        table.add_row(
            str(run.path),
            run.config.federation,
            run.status,
            run.strategy,
            f"{len(run.records)}/{run.config.rounds.total}",
            "" if last is None or last.accuracy is None else f"{last.accuracy:.2%}",
            "" if last is None or last.loss is None else f"{last.loss:.4f}",
        )
    Console().print(table)


@command.command("show")
@click.argument("run", type=click.Path())
@click.option("--clients", is_flag=True, help="Also what each client did.")
def show(run: str, *, clients: bool) -> None:
    """Show the rounds of RUN, and how its clients fare."""
    from rich.console import Console

    from edgetrain.coordinator.run.past_run import PastRun

    console = Console()
    past = PastRun.open(Path(run))
    console.print(
        f"federation {past.config.federation}, strategy {past.strategy}, {past.status}, "
        f"{len(past.records)} of {past.config.rounds.total} rounds"
    )
    if (best := past.best_round) is not None:
        console.print(f"best by {past.config.stop.metric}: round {best}, in {past.path / 'best.safetensors'}")
    console.print(_rounds_table(past))
    if past.evaluations:
        console.print(_spread_table(past))
        if worse := past.evaluations[-1].worse:
            console.print(f"worse off than when they were asked before: {', '.join(worse)}")
    if clients:
        console.print(_clients_table(past))


@command.command("plot")
@click.argument("run", type=click.Path())
@click.option("-o", "--out", default="", help="PNG, SVG or PDF. [default: plot.png in the run]")
def plot(run: str, out: str) -> None:
    """Draw loss, accuracy, bytes and participation of RUN over its rounds."""
    from edgetrain.cli.plot_run import plot_run
    from edgetrain.coordinator.run.past_run import PastRun

    past = PastRun.open(Path(run))
    path = Path(out) if out else past.path / "plot.png"
    plot_run(past, path)
    click.echo(path)


@command.command("pause")
@click.argument("run", type=click.Path())
def pause(run: str) -> None:
    """Pause RUN after the round that is open; its clients wait."""
    _ask(run, "pause", "pauses after its round")


@command.command("resume")
@click.argument("run", type=click.Path())
def resume(run: str) -> None:
    """Let a paused RUN go on."""
    _ask(run, "run", "goes on")


@command.command("stop")
@click.argument("run", type=click.Path())
def stop(run: str) -> None:
    """Stop RUN now. The command that started it goes on where it stopped."""
    _ask(run, "stop", "stops")


def _ask(run: str, request: str, what: str) -> None:
    from edgetrain.coordinator.run.past_run import PastRun
    from edgetrain.coordinator.run.requests import write_request

    past = PastRun.open(Path(run))
    write_request(past.path, request)  # type: ignore[arg-type]  # one of the three above
    now = "" if past.is_running else ", when its coordinator is started again"
    click.echo(f"{run}: {what}{now}")


def _rounds_table(past: PastRun) -> object:
    from rich.table import Table

    from edgetrain.cli.progress import size

    table = Table(title="rounds", title_justify="left")
    for name in ("round", "accuracy", "loss", "train loss", "clients", "up", "down", "s", "epsilon"):
        table.add_column(name, justify="right")
    for record in past.records:
        table.add_row(
            str(record.round),
            "" if record.accuracy is None else f"{record.accuracy:.2%}",
            "" if record.loss is None else f"{record.loss:.4f}",
            "" if record.train_loss is None else f"{record.train_loss:.4f}",
            f"{record.accepted}/{record.invited}",
            size(record.bytes_up),
            size(record.bytes_down),
            f"{record.seconds:.2f}",
            "" if record.epsilon is None else f"{record.epsilon:.3f}",
        )
    return table


def _spread_table(past: PastRun) -> object:
    from rich.table import Table

    table = Table(title="on the clients' own validation data", title_justify="left")
    columns = ("mean", "minimum", "p10", "median", "maximum", "deviation", "fairness")
    for name in ("round", "clients", "metric", *columns, "worse"):
        table.add_column(name, justify="right")
    for evaluation in past.evaluations:
        for metric, spread in evaluation.spread.items():
            table.add_row(
                str(evaluation.round),
                str(len(evaluation.clients)),
                metric,
                *(f"{getattr(spread, column):.4f}" for column in columns),
                str(len(evaluation.worse)),
            )
    return table


def _clients_table(past: PastRun) -> object:
    from rich.table import Table

    from edgetrain.cli.progress import size

    table = Table(title="clients", title_justify="left")
    for name in ("client", "accepted", "failed", "last round", "examples", "loss", "update", "s"):
        table.add_column(name, justify="right")
    for name in sorted({row.client for row in past.rows}):
        rows = [row for row in past.rows if row.client == name]
        accepted = [row for row in rows if row.status == "accepted"]
        last = accepted[-1] if accepted else None
        table.add_row(
            name,
            str(len(accepted)),
            str(sum(row.failed for row in rows)),
            str(last.round) if last else "",
            str(last.num_examples) if last else "",
            f"{last.loss:.4f}" if last and last.loss is not None else "",
            size(last.update_bytes) if last else "",
            f"{last.seconds:.2f}" if last else "",
        )
    return table

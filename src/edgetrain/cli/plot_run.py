"""Loss, accuracy, bytes and participation over the rounds of a run."""

from __future__ import annotations

from pathlib import Path

from edgetrain.coordinator.run.past_run import PastRun
from edgetrain.protocol.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")


def plot_run(run: PastRun, out: Path) -> None:
    """Draws a run.

    Args:
        run: with at least one round.
        out: the PNG, SVG or PDF to write.

    Raises:
        ConfigError: nothing to draw, matplotlib missing, or a file that cannot be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: write a file that ends in {', '.join(SUFFIXES)}")
    if not run.records:
        raise ConfigError(f"{run.path}: no round has closed yet")
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records, rounds = run.records, [record.round for record in run.records]
    figure, axes = plt.subplots(4, 1, figsize=(8, 11), sharex=True, layout="constrained")
    loss, accuracy, traffic, people = axes
    for name, label in (("loss", "held-out"), ("train_loss", "clients, while training")):
        points = [(r.round, getattr(r, name)) for r in records if getattr(r, name) is not None]
        if points:
            loss.plot(*zip(*points, strict=True), marker=".", label=label)
    points = [(r.round, 100 * r.accuracy) for r in records if r.accuracy is not None]
    if points:
        accuracy.plot(*zip(*points, strict=True), marker=".", label="held-out")
    for axis, metric, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        measured = [(e.round, e.spread[metric]) for e in run.evaluations if metric in e.spread]
        if measured:
            numbers = [number for number, _ in measured]
            low = [scale * spread.p10 for _, spread in measured]
            high = [scale * spread.maximum for _, spread in measured]
            middle = [scale * spread.median for _, spread in measured]
            axis.plot(numbers, middle, linestyle="--", label="clients, median")
            axis.fill_between(numbers, low, high, alpha=0.15, label="clients, 10 % to best")
    traffic.plot(rounds, [r.bytes_up_float32 / 1000 for r in records], color="tab:gray", label="float32 updates")
    traffic.plot(rounds, [r.bytes_down / 1000 for r in records], label="down")
    traffic.plot(rounds, [r.bytes_up / 1000 for r in records], label="up")
    traffic.set_yscale("symlog", linthresh=1)
    people.step(rounds, [r.invited for r in records], where="mid", label="invited", color="tab:gray")
    people.step(rounds, [r.accepted for r in records], where="mid", label="accepted")
    people.set_ylim(bottom=0)
    people.set_xlabel("round")
    people.xaxis.get_major_locator().set_params(integer=True)
    labels = ("loss", "accuracy, %", "kB per round, all clients", "clients")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    loss.set_title(f"{run.config.federation}: {run.strategy}, {len(records)} rounds, {run.status}")
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise ConfigError(f"{out}: cannot write: {error}") from error
    finally:
        plt.close(figure)

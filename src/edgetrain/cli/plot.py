"""Accuracy and bytes per round, as a PNG."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgetrain.coordinator.run.records import RoundRecord


def plot_rounds(rounds: Path, out: Path, *, title: str) -> None:
    """Draws a run.

    Args:
        rounds: rounds.jsonl of a run.
        out: the PNG to write.
        title: above the plot.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    records = [msgspec.json.decode(line, type=RoundRecord) for line in rounds.read_bytes().splitlines()]
    numbers = [record.round for record in records]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    top.plot(numbers, [(record.accuracy or 0) * 100 for record in records], marker="o", color="tab:blue")
    top.set_ylabel("test accuracy, %")
    top.set_title(title)
    top.grid(alpha=0.3)
    bottom.plot(
        numbers,
        [record.bytes_up_float32 / 1000 for record in records],
        color="tab:gray",
        label="float32 updates",
    )
    bottom.plot(numbers, [record.bytes_down / 1000 for record in records], color="tab:orange", label="down")
    bottom.plot(
        numbers,
        [record.bytes_up / 1000 for record in records],
        marker="o",
        color="tab:green",
        label="up, all messages",
    )
    bottom.set_yscale("log")
    bottom.set_ylabel("kB per round, all clients")
    bottom.set_xlabel("round")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.legend()
    bottom.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)

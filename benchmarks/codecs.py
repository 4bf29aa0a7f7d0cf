"""Codecs: bytes against the entropy bound, throughput against memcpy, size against what others send.

    python benchmarks/codecs.py [--parameters 1000000] [--out benchmarks/results]

Prints tables and writes codecs.json and codecs.png. One thread; the best of several repetitions.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import platform
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetrain.protocol import Limits, decode, encode
from edgetrain.protocol.codecs import supported_stages, wrap
from edgetrain.protocol.codecs.integers import encode_codes
from edgetrain.protocol.codecs.quantize import to_integers
from edgetrain.protocol.codecs.rice import encode_positions
from edgetrain.protocol.codecs.selection import magnitude_bits, top_k

Row = dict[str, Any]
DENSITIES = (0.001, 0.01, 0.05)
BLOCK = 256
SPECS = (
    "dense|float32",
    "dense|float16",
    "dense|int8",
    "dense|int4",
    "dense|sign",
    "topk:0.1|int8",
    "topk:0.05|int8",
    "topk:0.01|float32",
    "topk:0.01|int8",
    "topk:0.01|int8:stochastic",
    "topk:0.01|int4",
    "topk:0.01|ternary",
    "topk:0.001|int8",
    "randk:0.01|int8",
)


def deltas(size: int) -> dict[str, np.ndarray]:
    """Three shapes of tail at the asked size, and one real delta of a small network."""
    rng = np.random.default_rng(0)
    made = {
        "normal": rng.standard_normal(size),
        "laplace": rng.laplace(size=size),
        "student-t(3)": rng.standard_t(3, size),
    }
    return {name: (1e-3 * values).astype(np.float32) for name, values in made.items()} | {"digits MLP": digits_delta()}


def digits_delta() -> np.ndarray:
    """One epoch of SGD on scikit-learn's digits: a 64-256-10 perceptron in numpy, 19,210 parameters."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    start = [rng.normal(0, 0.125, (64, 256)), np.zeros(256), rng.normal(0, 0.0625, (256, 10)), np.zeros(10)]
    w1, b1, w2, b2 = (array.copy() for array in start)
    order = rng.permutation(len(images))
    for rows in np.array_split(order, len(order) // 32):
        x = images[rows]
        hidden = np.maximum(x @ w1 + b1, 0)
        logits = hidden @ w2 + b2
        grad = np.exp(logits - logits.max(1, keepdims=True))
        grad /= grad.sum(1, keepdims=True)
        grad[np.arange(len(rows)), labels[rows]] -= 1
        grad *= 0.1 / len(rows)
        grad_hidden = (grad @ w2.T) * (hidden > 0)
        for weights, step in (
            (w2, hidden.T @ grad),
            (b2, grad.sum(0)),
            (w1, x.T @ grad_hidden),
            (b1, grad_hidden.sum(0)),
        ):
            np.subtract(weights, step, out=weights)
    ends = (w1, b1, w2, b2)
    return np.concatenate([(end - begin).ravel() for end, begin in zip(ends, start, strict=True)]).astype(np.float32)


def entropy_bytes(symbols: np.ndarray) -> float:
    """Zeroth-order empirical entropy of the symbols; the model itself is free."""
    shares = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(shares * np.log2(shares)).sum() * len(symbols) / 8)


def position_rows(size: int) -> list[Row]:
    """Rice-coded random positions against n * H(k / n)."""
    rows = []
    for density in DENSITIES:
        positions = np.sort(np.random.default_rng(1).choice(size, round(size * density), replace=False))
        bound = size * (-density * math.log2(density) - (1 - density) * math.log2(1 - density)) / 8
        coded = len(encode_positions(positions))
        rows.append(
            {
                "density": density,
                "positions": len(positions),
                "bound": bound,
                "bytes": coded,
                "ratio": coded / bound,
            }
        )
    return rows


def value_rows(vectors: dict[str, np.ndarray]) -> list[Row]:
    """Coded int8 values, table and signs included, against the entropy of the same codes."""
    rows = []
    for name, delta in vectors.items():
        for density in (*DENSITIES, 1.0):
            values = delta[top_k(magnitude_bits(delta), max(1, round(len(delta) * density)))]
            starts = np.arange(0, len(values), BLOCK)
            scales, codes = to_integers(values, starts, 127, stochastic=False, seed=0, quantizer="int8")
            bound = entropy_bytes(codes)
            coding, coded = encode_codes(codes, 127, huffman=True)
            rows.append({
                "delta": name, "density": density, "values": len(values), "bits": 8 * bound / len(values),
                "coding": coding.name.lower(), "bytes": len(coded), "ratio": len(coded) / bound,
                "scale_bytes": 2 * len(scales),
            })  # fmt: skip
    return rows


def seconds(function: Callable[[], object], repetitions: int = 9) -> float:
    """The best of some runs."""
    return min(timeit.repeat(function, number=1, repeat=repetitions))


def codec_rows(delta: np.ndarray) -> list[Row]:
    """Size, error and throughput of whole codecs."""
    size = len(delta)
    limits = Limits(max_parameters=size)
    total = np.zeros(size, np.float64)
    norm = np.linalg.norm(delta)
    rows = []
    for spec in SPECS:
        payload = encode(delta, spec, seed=1)
        error = np.linalg.norm(delta - decode(payload, limits).dense()) / norm
        encoding = seconds(lambda spec=spec: encode(delta, spec, seed=1))
        folding = seconds(lambda payload=payload: decode(payload, limits).add_to(total))
        rows.append({
            "codec": spec, "bytes": len(payload), "bytes_per_parameter": len(payload) / size,
            "reduction": 4 * size / len(payload), "relative_error": float(error),
            "encode_per_second": size / encoding, "decode_fold_per_second": size / folding,
        })  # fmt: skip
    return rows


def other_rows(delta: np.ndarray) -> list[Row]:
    """What the same delta costs elsewhere."""
    forms = {
        "pickled list of floats": lambda: pickle.dumps(delta.tolist()),
        "pickled numpy": lambda: pickle.dumps(delta),
    }
    if "zstd" in supported_stages():
        forms["zstd of float32"] = lambda: wrap.compress(delta.tobytes())
    return [
        {"form": name, "bytes": len(form()), "bytes_per_parameter": len(form()) / len(delta),
         "encode_per_second": len(delta) / seconds(form, 2)}
        for name, form in forms.items()
    ]  # fmt: skip


def goals(report: dict[str, list[Row]]) -> list[Row]:
    """Each goal, what was measured, and whether it was met."""
    positions = max(row["ratio"] for row in report["positions"])
    values = max(row["ratio"] for row in report["values"] if row["values"] >= 10_000)
    codec = next(row for row in report["codecs"] if row["codec"] == "topk:0.01|int8")
    encoding, folding = codec["encode_per_second"], codec["decode_fold_per_second"]
    return [
        {"goal": "positions <= 1.02 x bound", "measured": positions, "met": positions <= 1.02},
        {
            "goal": "int8 values <= 1.03 x entropy, from 10,000 values on",
            "measured": values,
            "met": values <= 1.03,
        },
        {"goal": "top-1 % int8 encode >= 50 M/s", "measured": encoding, "met": encoding >= 50e6},
        {"goal": "top-1 % int8 decode + fold >= 200 M/s", "measured": folding, "met": folding >= 200e6},
    ]


def table(title: str, rows: list[Row]) -> None:
    """Prints rows under their keys."""
    print(f"\n{title}")
    cells = [[*rows[0]], *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def plot(report: dict[str, list[Row]], path: Path) -> None:
    """Bytes per parameter of every codec, and int8 values against their entropy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    sizes = {row["form"]: row["bytes_per_parameter"] for row in report["others"]}
    sizes |= {row["codec"]: row["bytes_per_parameter"] for row in report["codecs"]}
    bars = left.barh(
        list(sizes), list(sizes.values()), color=["gray"] * len(report["others"]) + ["tab:blue"] * len(SPECS)
    )
    left.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=7)
    left.set(xscale="log", xlabel="bytes per parameter", title="One update of a normal delta", xlim=(1e-3, 30))
    for name in dict.fromkeys(row["delta"] for row in report["values"]):
        rows = [row for row in report["values"] if row["delta"] == name]
        right.plot([row["values"] for row in rows], [row["ratio"] for row in rows], "o-", label=name)
    right.axhline(1.03, color="gray", linestyle="--", label="goal")
    right.set(
        xscale="log",
        xlabel="int8 values in the update",
        ylabel="bytes / entropy",
        title="int8 values, table included",
    )
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    vectors = deltas(arguments.parameters)
    normal = vectors["normal"]
    target = np.empty_like(normal)
    memcpy = len(normal) / seconds(lambda: np.copyto(target, normal), 50)
    report = {
        "positions": position_rows(arguments.parameters),
        "values": value_rows(vectors),
        "codecs": codec_rows(normal),
        "others": other_rows(normal),
    }
    for title, rows in report.items():
        table(title, rows)
    print(f"\nmemcpy of float32: {memcpy / 1e6:.0f} M parameters/s")
    checked = goals(report)
    for row in report["codecs"]:
        if row["codec"] == "topk:0.01|int8":
            print(f"  encode {row['codec']}: {row['encode_per_second'] / memcpy:.2f} of that speed")
    table("goals", checked)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    summary = {
        "parameters": arguments.parameters,
        **machine,
        "memcpy_per_second": memcpy,
        "goals": checked,
        **report,
    }
    (arguments.out / "codecs.json").write_text(json.dumps(summary, indent=1, default=bool) + "\n")
    plot(report, arguments.out / "codecs.png")


if __name__ == "__main__":
    main()

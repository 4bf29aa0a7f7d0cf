"""What `scripts/test-arm64` runs on the emulated device: self-tests of bundles, and the codecs' test vectors.

python device.py VECTORS BUNDLE...
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import numpy as np

from edgetrain.edge_client.runtimes import open_session
from edgetrain.edge_client.training.selftest import read_self_test, run_self_test
from edgetrain.protocol import Limits, decode, encode
from edgetrain.protocol.bundle import Bundle

# x86 and ARM add in another order; eager torch of the export is the reference.
TOLERANCE = 1e-4


def check_codecs(folder: Path) -> None:
    """The bytes that x86 wrote, and what it reads from them."""
    index = json.loads((folder / "cases.json").read_text())
    values = np.fromfile(folder / index["input"], "<f4")
    count = 0
    for case in index["cases"]:
        name, spec = case["name"], case["spec"]
        if "zstd" in name:
            continue
        payload = (folder / f"{name}.payload").read_bytes()
        if encode(values, spec, seed=int(index["seed"]), offsets=index["offsets"]) != payload:
            sys.exit(f"codec {name}: encodes other bytes here")
        decoded = decode(payload, Limits(max_parameters=len(values))).dense()
        if decoded.tobytes() != (folder / f"{name}.decoded.f32").read_bytes():
            sys.exit(f"codec {name}: decodes other values here")
        count += 1
    print(f"codecs: {count} test vectors, equal bytes both ways", flush=True)


def check_bundle(path: str) -> None:
    """The self-test on each runtime, and the time of a step under emulation."""
    bundle = Bundle(path)
    for program in bundle.manifest.programs:
        session = open_session(bundle, program.runtime)
        in_parts = session.head() is not None
        # In integers, torch's own reference and another processor may round a value to either side.
        tolerance = TOLERANCE if program.storage is None else None
        report = run_self_test(bundle, session, tolerance=tolerance, in_parts=in_parts)
        where = " in parts" if in_parts else ""
        batch, weights = read_self_test(bundle)
        start = time.perf_counter()
        session.step(bundle.initial_parameters(), batch, weights)
        seconds = time.perf_counter() - start
        print(
            f"{bundle.manifest.name} on {report.runtime}{where}: largest error {report.worst:.1e} of eager torch's, "
            f"{seconds * 1000:.0f} ms a step (emulated)",
            flush=True,
        )
        report.raise_if_wrong()


def main(vectors: str, *bundles: str) -> None:
    """Everything, or the first failure."""
    if platform.machine() != "aarch64":
        sys.exit(f"this is {platform.machine()}, not an emulated aarch64")
    check_codecs(Path(vectors))
    for path in bundles:
        check_bundle(path)
    if "torch" in sys.modules:
        sys.exit("torch was imported")


if __name__ == "__main__":
    main(*sys.argv[1:])

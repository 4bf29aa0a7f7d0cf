"""Runs one target under atheris: run.py TARGET CORPUS [libFuzzer options]. See scripts/fuzz.

Odd inputs are decoded as they are, even ones are edits to one of the target's seeds.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
NAME = sys.argv[1]

with atheris.instrument_imports(
    include=["edgetrain.protocol", "edgetrain.coordinator.audit", "edgetrain.coordinator.authority.registry", "tomllib"]
):
    from targets import TARGETS, edited

import numpy as np  # noqa: E402 - after what is instrumented

TARGET = TARGETS[NAME]
SEEDS = TARGET.seeds()
# [inputs, decoded], shared with the parent: libFuzzer ends the process without coming back to Python.
counts = np.frombuffer(mmap.mmap(-1, 16), np.int64)


def one_input(data: bytes) -> None:
    counts[0] += 1
    raw = data[:1] and data[0] & 1
    counts[1] += TARGET.one(data[1:] if raw else edited(SEEDS, data[1:]))


if __name__ == "__main__":
    corpus = Path(sys.argv[2])
    for number, payload in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(b"\x01" + payload)
        (corpus / f"edits-{number}").write_bytes(b"\x00" + bytes([number % 256]))
    started = time.monotonic()
    child = os.fork()
    if not child:
        limits = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=1024"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[2:]], one_input)
        atheris.Fuzz()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcome = "no failure" if status == 0 else f"FAILED with status {status}"
    seconds = time.monotonic() - started
    print(f"fuzz: {NAME}: {counts[0]} inputs, {counts[1]} of them decoded, {outcome}, {seconds:.0f} s", flush=True)
    sys.exit(status != 0)

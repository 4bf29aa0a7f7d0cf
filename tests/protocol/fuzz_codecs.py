"""atheris target: whatever the bytes, `decode` gives a vector within the limits or a `CodecError`.

Run by scripts/fuzz. An input with the magic byte is decoded as it is. Any other is a list of edits to one of
the test vectors, which reaches the stages behind the header far more often than chance does.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgetrain.protocol.codecs"]):
    import numpy as np

    from edgetrain.protocol.codecs import Limits, decode
    from edgetrain.protocol.errors import CodecError

VECTORS = Path(__file__).parent.parent / "vectors" / "codecs"
PAYLOADS = [file.read_bytes() for file in sorted(VECTORS.glob("*.payload"))]
LIMITS = Limits(max_parameters=4096)
# [inputs, decoded], shared with the parent: libFuzzer ends the process without coming back to Python.
counts = np.frombuffer(mmap.mmap(-1, 16), np.int64)


def one_input(data: bytes) -> None:
    counts[0] += 1
    if data[:1] != b"\xe7":
        data = edited(data)
    try:
        result = decode(data, LIMITS)
    except CodecError:
        return
    assert result.num_parameters <= LIMITS.max_parameters
    assert np.isfinite(result.dense()).all()
    counts[1] += 1


def edited(edits: bytes) -> bytes:
    """Byte 0 chooses a vector; then three bytes each: a position, and what to set there or, at 0, to cut."""
    if not edits:
        return edits
    payload = bytearray(PAYLOADS[edits[0] % len(PAYLOADS)])
    for high, low, value in zip(edits[1::3], edits[2::3], edits[3::3], strict=False):
        position = (high << 8 | low) % (len(payload) + 1)
        if value:
            payload[position : position + 1] = bytes([value])
        else:
            del payload[position : position + 1]
    return bytes(payload)


def write_corpus(directory: Path) -> None:
    """The test vectors, refused ones too, as first inputs."""
    for number, payload in enumerate(PAYLOADS):
        (directory / f"vector-{number}").write_bytes(payload)
    refused = json.loads((VECTORS / "cases.json").read_text())["refused"]["payloads"]
    for name, text in refused.items():
        (directory / name.replace(" ", "-")).write_bytes(bytes.fromhex(text))


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
    child = os.fork()
    if not child:
        atheris.Setup([sys.argv[0], "-max_len=4096", *sys.argv[1:]], one_input)
        atheris.Fuzz()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcome = "no failure" if status == 0 else f"FAILED with status {status}"
    print(f"fuzz: {counts[0]} inputs, {counts[1]} of them decoded, {outcome}")
    sys.exit(status != 0)

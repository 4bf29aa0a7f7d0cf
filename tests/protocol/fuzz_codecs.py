"""atheris target: whatever the bytes, `decode` gives a vector within the limits or a `CodecError`.

Run by scripts/fuzz. Half of the inputs get a valid header, so that they reach the stages behind it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgetrain.protocol.codecs"]):
    import numpy as np
    from edgetrain.protocol.codecs import Limits, decode
    from edgetrain.protocol.errors import CodecError

LIMITS = Limits(max_parameters=4096)
inputs = decoded = 0


def one_input(data: bytes) -> None:
    global inputs, decoded
    inputs += 1
    if data[:1] and data[0] & 1 and len(data) > 3:
        data = bytes([0xE7, 1, data[1] % 5 << 4 | data[2] % 4, data[3] % 3]) + data[4:]
    try:
        result = decode(data, LIMITS)
    except CodecError:
        return
    decoded += 1
    assert result.num_parameters <= LIMITS.max_parameters
    assert np.isfinite(result.dense()).all()


def corpus() -> list[str]:
    """The test vectors, refused ones too, as seed inputs."""
    vectors = Path(__file__).parent.parent / "vectors" / "codecs"
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for file in vectors.glob("*.payload"):
        (directory / file.name).write_bytes(file.read_bytes())
    refused = json.loads((vectors / "cases.json").read_text())["refused"]["payloads"]
    for name, text in refused.items():
        (directory / name.replace(" ", "-")).write_bytes(bytes.fromhex(text))
    return sys.argv[1:]


def report() -> None:
    print(f"fuzz: {inputs} inputs, {decoded} of them decoded, no failure", flush=True)


if __name__ == "__main__":
    arguments = corpus()
    # libFuzzer leaves through exit(), which runs atheris's own hooks only.
    atheris.Setup([sys.argv[0], "-max_len=4096", *arguments], one_input)
    try:
        atheris.Fuzz()
    finally:
        report()

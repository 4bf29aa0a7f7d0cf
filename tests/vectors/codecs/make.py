"""Writes the test vectors. Run it only for a new format version: the files are frozen.

PYTHONPATH=src:tests python tests/vectors/codecs/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edgetrain.protocol import encode
from edgetrain.protocol.codecs import wrap
from support import codec_reference

HERE = Path(__file__).parent
OFFSETS = [0, 16, 16, 400, 1000]
SEED = 0x0123456789ABCDEF
SPECS = {
    "dense-float32": "dense|float32",
    "dense-float16": "dense|float16",
    "dense-int8-packed": "int8:block=256|packed",
    "dense-int8-sparse": "int8:block=all|huffman",
    "dense-int8-huffman": "int8:block=tensor|huffman",
    "dense-int8-stochastic": "int8:block=64:stochastic|huffman",
    "dense-int4-packed": "int4:block=100|packed",
    "dense-int4-huffman": "int4:block=256|huffman",
    "dense-sign": "sign:block=128",
    "topk-float32": "topk:37|float32|rice",
    "topk-raw-float16": "topk:0.01|float16|raw",
    "topk-int8": "topk:0.25|int8:block=64|rice|huffman",
    "topk-int8-tensors": "topk:0.1:per=tensor|int8:block=tensor|rice|packed",
    "topk-int4-stochastic": "topk:0.1|int4:block=32:stochastic|rice|huffman",
    "topk-ternary": "topk:0.05|ternary|rice",
    "threshold-sign": "threshold:0.5|sign:block=50|rice",
    "randk-int8": "randk:100|int8:block=all|packed",
    "dense-int8-zstd": "int8:block=256|packed|zstd",
}
# Payloads that every decoder must refuse, with at most 10 parameters allowed: spaces separate the fields.
REFUSED = {
    "empty": "",
    "header cut": "e7 01 00",
    "another magic": "e6 01 00 00 00",
    "another version": "e7 02 00 00 00",
    "unknown index coding": "e7 01 04 00 00",
    "unknown quantizer": "e7 01 50 00 00",
    "unknown value coding": "e7 01 20 03 00",
    "unknown wrap": "e7 01 00 20 00",
    "Huffman-coded floats": "e7 01 00 01 00",
    "more parameters than allowed": "e7 01 20 00 0b 0b 0000 0000000000000000000000",
    "a varint of six bytes": "e7 01 00 00 808080808000",
    "bytes after the end": "e7 01 00 00 00 00",
    "values cut": "e7 01 00 00 02 0000803f000080",
    "not a number": "e7 01 00 00 01 0000c07f",
    "infinite float16": "e7 01 10 00 01 007c",
    "more values than parameters": "e7 01 03 00 02 03 0000000000000000 000000000000000000000000",
    "raw index beyond the vector": "e7 01 02 00 05 01 05000000 0000803f",
    "raw indices that repeat": "e7 01 02 00 05 02 0100000001000000 0000803f0000803f",
    "Rice parameter 31": "e7 01 01 00 05 01 1f 00 01 00000000 0000803f",
    "Rice quotients beyond the vector": "e7 01 01 00 05 01 00 05 20 0000803f",
    "Rice quotients without their last one": "e7 01 01 00 05 01 00 02 02 0000803f",
    "Rice padding": "e7 01 01 00 05 01 00 02 0c 0000803f",
    "Rice position beyond the vector": "e7 01 01 00 05 01 03 00 01 07 0000803f",
    "block longer than the update": "e7 01 20 00 02 03 803f 0102",
    "no block for two values": "e7 01 20 00 02 00 00 803f 0102",
    "block start at 0 again": "e7 01 20 00 02 00 02 00 00 01 803f803f 0102",
    "negative scale": "e7 01 20 00 02 02 80bf 0102",
    "scale times 127 not finite": "e7 01 20 00 02 02 007f 0102",
    "code -128": "e7 01 20 00 02 02 803f 0180",
    "int4 code -8": "e7 01 30 00 02 02 803f 81",
    "int4 padding": "e7 01 30 00 01 01 803f 11",
    "symbols beyond int4": "e7 01 30 01 02 02 803f 07 01 00",
    "code lengths that overfill": "e7 01 20 01 02 02 803f 01 02 0038",
    "code lengths beyond 15": "e7 01 20 01 02 02 803f 01 01 00000c",
    "Huffman code cut": "e7 01 20 01 02 02 803f 01 01 00 18",
    "more nonzero codes than values": "e7 01 20 02 02 02 803f 03",
    "sign padding": "e7 01 40 00 02 02 803f 04",
    "zstd size beyond the limit": "e7 01 00 10 ffffffff0f 28b52ffd",
    "zstd garbage": "e7 01 00 10 01 00112233",
}


def delta() -> np.ndarray:
    """1203 values: heavy tails, a tensor of zeros, a constant stretch, denormals, very different scales."""
    vector = np.random.default_rng(2024).standard_t(3, 1203)
    vector[16:400] = 0
    vector[20], vector[399] = 1e-30, -1e-42
    vector[600:640] = 0.125
    vector[1000:] *= 1e-4
    return vector.astype(np.float32)


def main() -> None:
    """Writes input.f32, one payload and one decoded vector per case, and cases.json."""
    vector = delta()
    (HERE / "input.f32").write_bytes(vector.astype("<f4").tobytes())
    cases = []
    for name, spec in SPECS.items():
        payload = encode(vector, spec, seed=SEED, offsets=OFFSETS)
        decoded = codec_reference.decode(payload, wrap.decompress)
        (HERE / f"{name}.payload").write_bytes(payload)
        (HERE / f"{name}.decoded.f32").write_bytes(np.array(decoded, "<f4").tobytes())
        cases.append({"name": name, "spec": spec})
    hashes = [
        {
            "seed": str(seed),
            "stream": stream,
            "counter": i,
            "hash": codec_reference.counter_hash(seed, stream, i),
        }
        for seed in (0, 1, SEED, 2**64 - 1)
        for stream in (1, 2)
        for i in (0, 1, 1_000_000)
    ]
    index = {
        "input": "input.f32",
        "offsets": OFFSETS,
        "seed": str(SEED),
        "cases": cases,
        "counter_hash": hashes,
        "refused": {"max_parameters": 10, "payloads": REFUSED},
    }
    (HERE / "cases.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()

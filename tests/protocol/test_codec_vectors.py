"""The frozen test vectors: this version writes and reads the bytes that every earlier one did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetrain.protocol import CodecError, Limits, decode, encode
from edgetrain.protocol.codecs import supported_stages
from edgetrain.protocol.codecs.hashing import counter_hash
from support import codec_reference

HERE = Path(__file__).parent.parent / "vectors" / "codecs"
INDEX = json.loads((HERE / "cases.json").read_text())
INPUT = np.fromfile(HERE / INDEX["input"], "<f4")
NAMES = {case["name"]: case["spec"] for case in INDEX["cases"]}
REFUSED = INDEX["refused"]["payloads"]


def skip_without_zstd(name):
    if "zstd" in name and "zstd" not in supported_stages():
        pytest.skip("no zstd here")


@pytest.mark.parametrize("name", [name for name in NAMES if "zstd" not in name])
def test_encoding_is_frozen(name):
    payload = encode(INPUT, NAMES[name], seed=int(INDEX["seed"]), offsets=INDEX["offsets"])
    assert payload == (HERE / f"{name}.payload").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_frozen(name):
    skip_without_zstd(name)
    decoded = decode((HERE / f"{name}.payload").read_bytes(), Limits(max_parameters=len(INPUT)))
    np.testing.assert_array_equal(decoded.dense(), np.fromfile(HERE / f"{name}.decoded.f32", "<f4"))


@pytest.mark.parametrize("name", [name for name in NAMES if "zstd" not in name])
def test_the_decoder_written_from_the_document_agrees(name):
    decoded = codec_reference.decode((HERE / f"{name}.payload").read_bytes())
    assert decoded == np.fromfile(HERE / f"{name}.decoded.f32", "<f4").tolist()


@pytest.mark.parametrize("why", REFUSED)
def test_refused_payloads(why):
    limits = Limits(max_parameters=INDEX["refused"]["max_parameters"])
    with pytest.raises(CodecError):
        decode(bytes.fromhex(REFUSED[why]), limits)


def test_refused_payloads_are_refused_for_their_own_reason():
    # The nearest valid neighbours of three of them decode: the refusals test what they say.
    limits = Limits(max_parameters=10)
    for valid in (
        "e7 01 01 00 05 01 00 02 04 0000803f",
        "e7 01 20 00 02 02 803f 0181",
        "e7 01 30 00 01 01 803f 01",
    ):
        decode(bytes.fromhex(valid), limits)


def test_counter_hash():
    for case in INDEX["counter_hash"]:
        found = counter_hash(int(case["seed"]), case["stream"], case["counter"] + 1)[-1]
        assert int(found) == case["hash"]

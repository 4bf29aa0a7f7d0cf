"""The test vectors in the documentation are what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from edgetrain.protocol.enrolment import Authority
from edgetrain.protocol.secure_aggregation.messages import session_digest, work_digest
from edgetrain.protocol.training import TrainingConfig

DOCS = Path(__file__).parents[2] / "docs"


def vectors(file):
    """Indented blocks of hex by their labels."""
    text = (DOCS / file).read_text()
    found = re.findall(r"^    ([a-z]+) +([0-9a-f]{2,}(?:\n {16}[0-9a-f]+)*)$", text, re.MULTILINE)
    return {label: bytes.fromhex("".join(data.split())) for label, data in found}


def test_work_and_session():
    expected = vectors("secure-aggregation.md")
    training = TrainingConfig(learning_rate=0.5, epochs=3)
    alike = msgspec.structs.replace(training, epochs=1, batch_size=1)
    assert msgspec.msgpack.encode((alike, ("head.*",))) == expected["array"]
    work = work_digest(bundle=b"\x01" * 32, vector=b"\x02" * 32, training=training, personal=("head.*",))
    assert work == expected["work"]
    session = session_digest(
        federation="f", run=b"\x03" * 16, round_number=7, nonce=b"\x04" * 16, work=work, settings=b"\x80"
    )
    assert session == expected["session"]


def test_a_proof_of_enrolment():
    expected = vectors("security.md")
    authority = Authority(expected["authority"].hex(), "f")
    assert authority.has_enrolled("pi", bytes(range(32)), expected["enrolment"])

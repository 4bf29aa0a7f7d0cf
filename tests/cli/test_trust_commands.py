"""init, enroll, revoke, audit: what they say to wrong input; one line, exit status 1, nothing written."""

from __future__ import annotations

import json
import os

import pytest

from edgetrain.coordinator.audit import AuditLog
from edgetrain.coordinator.audit.records import Accepted, Opened, RefusedUpdate
from edgetrain.protocol.signing import SigningKey
from support.enrolled import edgetrain

KEY = SigningKey(b"k" * 32)


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    opened = Opened(run="00" * 16, federation="f", bundle="00" * 32, public_key=KEY.public_key.hex())
    log = AuditLog(path, key=KEY, opened=opened)
    log.append(Accepted(client="a", round=1, digest="ab" * 32, bytes=5, num_examples=3))
    log.append(RefusedUpdate(client="b", round=1, digest="cd" * 32, kind="replay", reason="is of another run"))
    log.close()
    return path


def said(text):
    """The error, which is one line."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_wrong_input_of_init_enroll_and_revoke(tmp_path):
    fed = tmp_path / "fed"
    assert "federation name 'a/b'" in said(edgetrain("init", fed, "--name", "a/b", "--host", "h", status=1))
    assert not (fed / "ca.key").exists()
    assert "host" in said(edgetrain("init", fed, "--host", "no host", status=1))
    assert "is no federation directory" in said(edgetrain("revoke", "pi", "--dir", fed, status=1))
    (tmp_path / "file").touch()
    assert "cannot be written" in said(edgetrain("init", tmp_path / "file" / "fed", "--host", "h", status=1))
    if os.geteuid() == 0:
        return
    (tmp_path / "readonly").mkdir(mode=0o500)
    assert "cannot be written" in said(edgetrain("init", tmp_path / "readonly" / "fed", "--host", "h", status=1))


def test_verify_and_show(run):
    assert "run: whole: 4 lines of run" in edgetrain("audit", "verify", run)
    report = json.loads(edgetrain("audit", "verify", run, "--key", KEY.public_key.hex(), "--format", "json"))
    assert report["kinds"] == {"opened": 1, "accepted": 1, "refused_update": 1, "seal": 1}
    assert edgetrain("audit", "show", run, "--client", "b").split()[2:7] == [
        "refused_update", "client=b", "round=1", "digest=cdcdcdcdcdcdcdcd…", "kind=replay",
    ]  # fmt: skip
    assert "nothing about c" in edgetrain("audit", "show", run, "--client", "c")
    assert json.loads(edgetrain("audit", "show", run, "--type", "accepted", "--format", "json"))["client"] == "a"


def test_wrong_input_of_audit(run, tmp_path):
    assert "holds no audit.jsonl" in said(edgetrain("audit", "verify", tmp_path, status=1))
    assert "holds no audit.jsonl" in said(edgetrain("audit", "show", tmp_path, status=1))
    assert "is not a public key" in said(edgetrain("audit", "verify", run, "--key", "xyz", status=1))
    assert "is sealed by key" in said(edgetrain("audit", "verify", run, "--key", "00" * 32, status=1))
    (tmp_path / "seen").write_text("no json\n")
    assert "is not a client's checkpoints.jsonl" in said(
        edgetrain("audit", "verify", run, "--seen", tmp_path / "seen", status=1)
    )
    line = {"run": "00" * 16, "records": 4, "head": "11" * 32, "serial": 1}
    (tmp_path / "seen").write_text(json.dumps(line) + "\n")
    assert "another log than the one that a client has seen" in said(
        edgetrain("audit", "verify", run, "--seen", tmp_path / "seen", status=1)
    )
    (run / "audit.jsonl").write_bytes(b"\xff" * 100)
    assert "line 1" in said(edgetrain("audit", "verify", run, status=1))
    assert "line 1" in said(edgetrain("audit", "show", run, status=1))
    (run / "audit.jsonl").write_bytes(b"")
    assert "line 1" in said(edgetrain("audit", "verify", run, status=1))

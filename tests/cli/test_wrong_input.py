"""Every wrong input: one clear message, no stack trace, exit status 1 (ours) or 2 (the flags')."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import tomli_w

from edgetrain.cli import _COMMANDS, main
from edgetrain.coordinator.broker import free_port
from support.tiny_bundle import make_data


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command in this process: (exit status, stdout, stderr). Anything but SystemExit fails the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root, level = logging.getLogger(), logging.getLogger("edgetrain").level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgetrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    before = root.handlers[:], root.level
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    root.handlers[:], root.level = before
    logging.getLogger("edgetrain").setLevel(level)


@pytest.fixture
def data(tmp_path):
    x, y = make_data(20)
    np.savez(tmp_path / "data.npz", inputs=x, targets=y)
    return tmp_path / "data.npz"


def refused(result, match, *, status=1):
    """Exactly one message, and it is the last thing said."""
    code, out, err = result
    assert code == status, (out, err)
    assert "Traceback" not in err
    messages = [line for line in err.splitlines() if re.match(r"(error|Error): ", line)]
    assert len(messages) == 1, err
    message = err[err.index(messages[0]) :].strip()
    assert re.search(match, message), message
    assert len(message.splitlines()) == 1, message
    return message


# --- bundles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_bundles_that_are_none(cli, tiny_bundle, tmp_path, command):
    refused(cli(command, tmp_path / "none"), r"no such bundle.*edgetrain export")
    refused(cli(command, tmp_path), r"manifest\.json is missing")
    (tmp_path / "x.edge").write_bytes(b"PK\x03\x04 rubbish")
    refused(cli(command, tmp_path / "x.edge"), "not an .edge archive")
    corrupt = shutil.copytree(tiny_bundle, tmp_path / "corrupt")
    graph = corrupt / "onnxruntime/step.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    refused(cli(command, corrupt), r"step\.onnx is corrupt")
    later = shutil.copytree(tiny_bundle, tmp_path / "later")
    manifest = json.loads((later / "manifest.json").read_bytes()) | {"format_version": [7, 0]}
    (later / "manifest.json").write_text(json.dumps(manifest))
    refused(cli(command, later), r"format version 7\.0.*upgrade edgetrain")


def test_a_wrong_runtime(cli, tiny_bundle):
    refused(
        cli("verify", tiny_bundle, "--runtime", "abacus"), "no runtime is called 'abacus'; known are: onnxruntime, "
    )
    refused(cli("verify", tiny_bundle, "--runtime", "executorch"), "no program for runtime 'executorch', only for: ")


def test_a_good_bundle(cli, tiny_bundle):
    assert cli("verify", tiny_bundle)[0] == 0
    code, out, _ = cli("inspect", tiny_bundle)
    assert code == 0
    assert "first.weight" in out
    assert json.loads(cli("inspect", tiny_bundle, "--json")[1])["name"] == "tiny"


def test_a_bundle_that_computes_wrong_numbers_here(cli, tiny_bundle, tmp_path):
    wrong = shutil.copytree(tiny_bundle, tmp_path / "wrong")
    manifest = json.loads((wrong / "manifest.json").read_bytes())
    manifest["self_test"]["gradients"][0]["norm"] *= 2
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = cli("verify", wrong)
    assert (code, err) == (1, "")
    assert re.search(r"first\.weight .*WRONG", out)
    assert out.splitlines()[-1].startswith("FAILED")


# --- client ------------------------------------------------------------------------------------------


def client(data, tmp_path, *more):
    return ("client", "--name", "pi", "--federation", "f", "--data", data, "--state", tmp_path / "state",
            "--broker-connect-timeout-seconds", "0.1", *more)  # fmt: skip


def test_the_clients_flags(cli, data, tmp_path):
    refused(cli("client"), "a setting is missing: `name`")
    refused(cli(*client(data, tmp_path, "--name", "a/b")), "client name 'a/b' is not usable")
    refused(cli(*client(data, tmp_path, "--federation", "#")), "federation name '#' is not usable")
    refused(cli(*client(data, tmp_path, "--broker", "http://x")), "is not HOST, HOST:PORT or SCHEME")
    refused(cli(*client(data, tmp_path, "--threads", "-1")), "`threads`")
    refused(cli(*client(data, tmp_path, "--threads", "many")), "many", status=2)
    refused(cli(*client(data, tmp_path, "--broker-mqtt-version", "4")), "'4' is not one of", status=2)
    refused(cli(*client(data, tmp_path, "--colour", "blue")), "--colour", status=2)
    refused(cli(*client(data, tmp_path, "--config", tmp_path / "none.toml")), r"none\.toml: no such configuration file")
    (tmp_path / "bad.toml").write_text("naem = 'x'")
    refused(cli(*client(data, tmp_path, "--config", tmp_path / "bad.toml")), "there is no setting called `naem`")
    (tmp_path / "bad.toml").write_text("name = ")
    refused(cli(*client(data, tmp_path, "--config", tmp_path / "bad.toml")), r"bad\.toml")


def test_a_client_without_data_does_not_look_for_a_broker(cli, tmp_path):
    missing = tmp_path / "none.npz"
    message = refused(cli(*client(missing, tmp_path, "--broker", f"127.0.0.1:{free_port()}")), "no such file")
    assert str(missing) in message


def test_a_client_without_a_broker(cli, data, tmp_path):
    port = free_port()
    message = refused(cli(*client(data, tmp_path, "--broker", f"127.0.0.1:{port}")), f"127.0.0.1:{port}")
    assert "Is it running" in message


def test_a_client_whose_broker_is_something_else(cli, data, tmp_path, monkeypatch):
    monkeypatch.setattr("edgetrain.protocol.transport.mqtt.CONNACK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(cli(*client(data, tmp_path, "--broker", f"127.0.0.1:{port}")), "does not answer as an MQTT broker")


@pytest.mark.parametrize("state", ["/dev/null/x", "/proc/nothing"])
def test_a_client_that_cannot_keep_its_state(cli, data, tmp_path, state):
    refused(cli(*client(data, tmp_path, "--state", state)), "cannot use the state directory")


# --- coordinator -------------------------------------------------------------------------------------


@pytest.fixture
def federation(tiny_bundle, tmp_path):
    """Writes federation.toml with changes; returns its path."""

    def write(**changes):
        settings = {
            "federation": "f",
            "bundle": str(tiny_bundle),
            "out": str(tmp_path / "run"),
            "broker": {"host": "127.0.0.1", "port": free_port(), "connect_timeout_seconds": 0.1},
        } | changes
        path = tmp_path / "federation.toml"
        path.write_text(tomli_w.dumps(settings))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"federation": "a b"}, "federation name 'a b' is not usable"),
        ({"bundle": "/none"}, "/none: no such bundle"),
        ({"codec": "gzip"}, "codec 'gzip'"),
        ({"strategy": "fedbest"}, "strategy 'fedbest' is not known; there is: .*fedavg"),
        ({"out": "/dev/null/x"}, "cannot use the run directory"),
        ({"rounds": {"goal": 0}}, "`rounds.goal`"),
        ({"rounds": {"gaol": 2}}, "there is no setting called `gaol` - at `rounds`"),
        ({"training": {"learning_rate": "fast"}}, "`training.learning_rate`"),
        ({"evaluation": {"data": "none.npz"}}, r"none\.npz: no such file"),
        ({"evaluation": {"data": "none.txt"}}, r"none\.txt"),
        ({}, "cannot reach the MQTT broker"),
    ],
    ids=str,
)
def test_the_coordinators_settings(cli, federation, changes, match):
    refused(cli("coordinator", "--config", federation(**changes)), match)


def test_the_coordinators_flags(cli, federation):
    refused(cli("coordinator"), "--config", status=2)
    refused(cli("coordinator", "--config", "none.toml"), "no such configuration file")
    refused(cli("coordinator", "--config", federation(), "--set", "rounds.total"), "write KEY=VALUE", status=2)
    refused(cli("coordinator", "--config", federation(), "--set", "rounds.total=many"), "`rounds.total`")
    refused(cli("coordinator", "--config", federation(), "--workers", "many"), "write processes:N or ray:N")
    refused(cli("coordinator", "--config", federation(), "--set", "federation.x=1"), "federation is a value")
    refused(cli("coordinator", "--config", federation(), "--broker", "x:y"), "HOST or HOST:PORT")


def test_a_broker_that_cannot_be_started(cli, federation):
    with socket.create_server(("127.0.0.1", 0)) as server:
        path = federation(broker={"host": "127.0.0.1", "port": server.getsockname()[1]})
        refused(cli("coordinator", "--config", path, "--broker", "embedded"), "is taken")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"inputs": np.zeros((4, 9), np.float32), "targets": np.zeros(4, np.int64)}, "inputs"),
        ({"inputs": np.zeros((4, 5), "U3"), "targets": np.zeros(4, np.int64)}, "inputs"),
        ({"inputs": np.full((4, 5), np.inf, np.float32), "targets": np.zeros(4, np.int64)}, "inputs"),
        ({"inputs": np.zeros((4, 5), np.float32), "targets": np.full(4, 0.5)}, "targets"),
        ({"inputs": np.zeros((4, 5), np.float32)}, "targets"),
    ],
    ids=["shape", "strings", "inf", "fractions", "missing"],
)
def test_evaluation_data_that_does_not_fit(cli, federation, tmp_path, arrays, match):
    np.savez(tmp_path / "test.npz", **arrays)
    path = federation(evaluation={"data": str(tmp_path / "test.npz")})
    refused(cli("coordinator", "--config", path), rf"test\.npz.*{match}")


def test_a_run_directory_of_another_federation(cli, federation):
    refused(cli("coordinator", "--config", federation()), "cannot reach")  # made the directory
    refused(cli("coordinator", "--config", federation(federation="g")), "choose another `out`")


def test_a_full_disk_or_whatever_the_system_says_is_one_message(cli, federation, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("edgetrain.coordinator.serve.serve", fail)
    refused(cli("coordinator", "--config", federation()), r"somewhere: No space left on device$")


# --- export and demo ---------------------------------------------------------------------------------


MODEL = """
import torch
def model():
    raise ValueError("nothing works")
"""


def test_exports_that_cannot_be(cli, tmp_path):
    pytest.importorskip("torch")
    refused(cli("export", "no-such-model", "-o", tmp_path / "x"), "no-such-model.*digits-cnn")
    refused(cli("export", tmp_path / "none.py:model"), r"none\.py")
    (tmp_path / "m.py").write_text(MODEL)
    refused(cli("export", f"{tmp_path}/m.py:modell"), "modell")
    code, _, err = cli("export", f"{tmp_path}/m.py:model")  # their own lines are shown, none of ours
    assert code == 1
    assert err.startswith("error: ")
    assert err.endswith("ValueError: nothing works\n")
    assert "edgetrain/export" not in err
    refused(cli("export", "digits-cnn", "--set", "x"), "write KEY=VALUE", status=2)
    refused(cli("export", "digits-cnn", "--runtime", "abacus", "-o", tmp_path / "x"), "abacus")
    refused(cli("export", "digits-cnn", "--trainable", "last:0", "-o", tmp_path / "x"), "last:0")
    refused(cli("export", "digits-cnn", "--trainable", "nothing-like-it", "-o", tmp_path / "x"), "nothing-like-it")
    refused(cli("export"), "MODEL", status=2)
    assert not (tmp_path / "x").exists()


def test_demos_that_cannot_be(cli, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    refused(cli("demo", "--out", tmp_path / "mine"), "not an earlier demo's")
    refused(cli("demo", "--out", tmp_path / "mine/thesis.txt"), "is a file")
    refused(cli("demo", "--out", "/dev/null/x"), "/dev/null/x")
    refused(cli("demo", "--clients", "0"), "--clients", status=2)
    refused(cli("demo", "--rounds", "none"), "--rounds", status=2)
    refused(cli("demo", "--non-iid", "0"), "--non-iid", status=2)
    refused(cli("demo", "--broker", "a:b:c", "--out", tmp_path / "d"), "HOST or HOST:PORT")
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_a_demo_without_its_broker_does_not_export_first(cli, tmp_path):
    refused(cli("demo", "--broker", f"127.0.0.1:{free_port()}", "--out", tmp_path / "d"), "cannot reach")


# --- the command itself ------------------------------------------------------------------------------


def test_unknown_commands(cli):
    refused(cli("trian"), "No such command 'trian'", status=2)
    code, out, err = cli()
    assert code in {0, 2}
    assert "coordinator" in out + err


@pytest.mark.parametrize("command", _COMMANDS)
def test_help(cli, command):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")


def test_a_reader_that_goes_away_is_no_error(tiny_bundle):
    command = f"{sys.executable} -m edgetrain inspect {tiny_bundle} | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout.startswith("tiny")


def test_what_is_not_installed_is_named_with_its_extra(tiny_bundle):
    code = (
        "import sys\nsys.modules['paho'] = None\n"
        "sys.argv = ['edgetrain', 'client', '--name', 'a', '--federation', 'f', '--data', 'd']\n"
        "from edgetrain.cli import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'edgetrain[client]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_key_is_nowhere_in_what_is_said(cli, data, tmp_path, caplog):
    cli(*client(data, tmp_path, "--broker", f"127.0.0.1:{free_port()}", "--broker-password", "hunter2"))
    assert "hunter2" not in caplog.text
    assert msgspec.json.encode("hunter2").decode() not in caplog.text

"""device.toml and its flags."""

from __future__ import annotations

import re

import msgspec
import pytest
from click.testing import CliRunner

from edgetrain.cli.client import command
from edgetrain.cli.settings import load_settings, setting
from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.errors import ConfigError
from edgetrain.protocol.transport.mqtt import BrokerConfig

TOML = """
name = "pi"
federation = "f"
data = "d.npz"
threads = 2
[broker]
host = "far"
mqtt_version = "3.1.1"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "device.toml"
    path.write_text(TOML)
    return str(path)


def test_the_file(file):
    assert load_settings(ClientConfig, file, {}) == ClientConfig(
        name="pi", federation="f", data="d.npz", threads=2, broker=BrokerConfig(host="far", mqtt_version="3.1.1")
    )


def test_flags_override_the_file_and_those_not_given_do_not(file):
    given = {setting("name"): "other", setting("broker.port"): 99, setting("threads"): None, "config": file}
    config = load_settings(ClientConfig, file, given)
    assert (config.name, config.threads, config.broker.host, config.broker.port) == ("other", 2, "far", 99)


def test_flags_alone_suffice():
    given = {setting("name"): "a", setting("federation"): "f", setting("data"): "x.csv"}
    assert load_settings(ClientConfig, None, given) == ClientConfig(name="a", federation="f", data="x.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nmae = 'x'", "there is no setting called `nmae`"),
        ("[broker]\nprot = 1", "there is no setting called `prot` - at `broker`"),
        ("threads = -1", "`threads`"),
        ("validation_fraction = 1.0", "`validation_fraction`"),
        ("max_bundle_bytes = 0", "`max_bundle_bytes`"),
        ("[broker]\nmqtt_version = '4'", "`broker.mqtt_version`"),
        ("exit_when_done = 'yes'", "`exit_when_done`"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path, line, message):
    path = tmp_path / "device.toml"
    path.write_text("name='a'\nfederation='f'\ndata='d'\n" + line)
    with pytest.raises(ConfigError, match=rf"device\.toml: .*{re.escape(message)}"):
        load_settings(ClientConfig, str(path), {})


def test_every_setting_is_a_flag_with_a_help_text():
    text = CliRunner().invoke(command, ["--help"]).output

    def check(kind, prefix):
        for field in msgspec.structs.fields(kind):
            if field.type is BrokerConfig:
                check(BrokerConfig, "broker-")
            else:
                assert f"--{prefix}{field.name.replace('_', '-')}" in text, field.name

    check(ClientConfig, "")

"""Configuration: an error names the file, the key, and what is wrong with it."""

from __future__ import annotations

import pytest

from edgetrain.coordinator.config import FederationConfig
from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.config import convert, read_toml, set_dotted
from edgetrain.protocol.errors import ConfigError

GOOD = {"federation": "f", "bundle": "b", "out": "o"}


def test_defaults_fill_what_is_left_out():
    config = convert(GOOD, FederationConfig, where="f.toml")
    assert config.rounds.total == 20
    assert config.rounds.least == config.rounds.goal == 2


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"rounds": {"goall": 3}},
            r"^f\.toml: there is no setting called `goall` - at `rounds`; did you mean `goal`\?$",
        ),
        ({"bundel": "b"}, r"^f\.toml: there is no setting called `bundel`; did you mean `bundle`\?$"),
        ({"xyz": 3}, r"^f\.toml: there is no setting called `xyz`; there are: federation, bundle, out, .*rounds"),
        ({"rounds": {"xyz": 3}}, r"there is no setting called `xyz` - at `rounds`; there are: total, goal, "),
        ({"rounds": {"goal": 0}}, r"f\.toml: .*>= 1.*`rounds\.goal`"),
        ({"rounds": {"goal": "3"}}, r"f\.toml: .*`int`, got `str`.*`rounds\.goal`"),
        ({"rounds": 3}, r"f\.toml: .*got `int`.*`rounds`"),
        ({"broker": {"port": 70000}}, r"f\.toml: .*`broker\.port`"),
        ({"start_broker": "rabbit"}, r"f\.toml: .*'rabbit'.*`start_broker`"),
        ({"training": {"momentum": 1.0}}, r"f\.toml: .*`training\.momentum`"),
        ({"training": {"schedule": {"name": "sine"}}}, r"f\.toml: .*`training\.schedule\.name`"),
    ],
)
def test_a_wrong_setting_is_named(tables, message):
    with pytest.raises(ConfigError, match=message):
        convert(GOOD | tables, FederationConfig, where="f.toml")


@pytest.mark.parametrize("kind", [FederationConfig, ClientConfig])
def test_a_missing_setting_is_named(kind):
    with pytest.raises(ConfigError, match=r"^f\.toml: .*missing.*`(federation|name)`"):
        convert({}, kind, where="f.toml")


@pytest.mark.parametrize("contents", [b"a = ", b"\xff\xfe", b"[a\n", b"a = 1\na = 2"])
def test_what_is_not_toml_is_named(tmp_path, contents):
    path = tmp_path / "f.toml"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=r"f\.toml: "):
        read_toml(path)


def test_no_file_and_no_readable_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such configuration file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="directory"):
        read_toml(tmp_path)


def test_dotted_keys_make_tables():
    tables = {"a": {"b": 1}}
    set_dotted(tables, "a.c.d", 2)
    set_dotted(tables, "e", 3)
    assert tables == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    with pytest.raises(ConfigError, match=r"a\.b\.x: b is a value"):
        set_dotted(tables, "a.b.x", 1)

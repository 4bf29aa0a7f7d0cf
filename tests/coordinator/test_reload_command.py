"""A broker elsewhere is told by a command of the operator's."""

from __future__ import annotations

import re
import sys

import pytest

from edgetrain.coordinator.authority.reload import reload_by
from edgetrain.protocol.errors import ConfigError
from support.processes import wait_for


def test_the_command_runs_each_time(tmp_path):
    log = tmp_path / "log file"
    reload = reload_by(f"{sys.executable} -c 'import sys; open(sys.argv[1], \"a\").write(\"x\")' '{log}'")
    reload()
    reload()
    wait_for(lambda: log.exists() and log.read_text() == "xx", "both", seconds=20)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"{sys.executable} -c 'print(\"no such unit\"); raise SystemExit(5)'", "status 5.*no such unit"),
        ("/no/such/program --reload", "No such file.*has not read its files again"),
    ],
)
def test_a_command_that_fails_is_heard_of(command, said, caplog):
    reload_by(command)()
    wait_for(lambda: re.search(said, caplog.text), said, seconds=20)


@pytest.mark.parametrize(("command", "why"), [("kill 'x", "No closing quotation"), ("  ", "names no program")])
def test_a_command_that_is_none(command, why):
    with pytest.raises(ConfigError, match=f"reload_command: .*{why}"):
        reload_by(command)

"""The client as a systemd service: it says that it is ready and alive, and fits into its memory limit."""

from __future__ import annotations

import configparser
import contextlib
import csv
import resource
import socket
import threading
from pathlib import Path

import pytest

from edgetrain.coordinator.broker import find_mosquitto
from edgetrain.edge_client.host.service import LivingTransport, Service
from edgetrain.protocol.transport import MemoryBroker
from support.cgroup import memory_group
from support.federation import ENVIRONMENT, Federation

UNIT = Path(__file__).parents[2] / "examples/edgetrain-client.service"
LIMIT_MB = 256


class Manager:
    """systemd's end of the socket."""

    END = b"that is all"

    def __init__(self, path):
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.lines = []
        self.thread = threading.Thread(target=self.read)

    def read(self):
        while (line := self.socket.recv(4096)) != self.END:
            self.lines.append(line.decode())

    def heard(self):
        """Everything, when nobody speaks any more."""
        if self.thread.is_alive():
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(self.END, str(self.path))
            self.thread.join()
        return self.lines


@pytest.fixture
def manager(ram_path):
    manager = Manager(ram_path / "notify")
    manager.thread.start()
    yield manager
    manager.heard()
    manager.socket.close()


def test_signs_of_life_come_with_every_wait_and_no_more_often_than_needed(manager):
    now = [0.0]
    service = Service({"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "30000000"}, clock=lambda: now[0])
    transport = LivingTransport(MemoryBroker().connect(), service)
    for step in range(300):
        now[0] = step * 0.1
        transport.receive(0)
    assert manager.heard() == ["WATCHDOG=1"] * 3


def test_a_service_manager_that_does_not_read_stops_nobody(ram_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(ram_path / "deaf"))
        service = Service({"NOTIFY_SOCKET": str(ram_path / "deaf")})
        for _ in range(2000):
            service.say("WATCHDOG=1")


def test_without_a_service_manager_nothing_is_said():
    service = Service({})
    service.ready()
    service.alive()
    Service({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1"}).alive()


def unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string("\n".join(line for line in UNIT.read_text().splitlines() if not line.startswith("#")))
    return parser


def test_the_unit_file_says_what_is_tested_here():
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["MemoryMax"] == f"{LIMIT_MB}M"
    assert int(service["WatchdogSec"]) > 60
    assert service["Restart"] == "always"


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
@pytest.mark.parametrize("limit", ["private memory", "cgroup"])
def test_a_client_under_its_memory_limit_says_that_it_is_ready_and_alive(
    processes, digits_bundle, tmp_path, manager, limit
):
    """The real command with the unit's limit; it trains a small CNN."""
    pytest.importorskip("sklearn")
    from edgetrain.models.data import digits

    train, test = digits(seed=7)
    federation = Federation(
        processes, tmp_path, digits_bundle, clients=1, data=[(train.inputs, train.targets)],
        test=(test.inputs, test.targets),
        rounds={"total": 3, "goal": 1, "minimum": 1},
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        enter = lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_MB << 20, LIMIT_MB << 20))
        group = None
        if limit == "cgroup":
            group = stack.enter_context(memory_group(LIMIT_MB << 20))
            if group is None:
                pytest.skip("no cgroup with a memory limit can be made here")
            enter = group.enter
        stack.callback(federation.stop_broker)
        stack.callback(processes.end_all)
        client = processes.edgetrain(
            "client", "--config", tmp_path / "client-1.toml", log=tmp_path / "client-1.log",
            env=ENVIRONMENT | {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "600000"},
            preexec_fn=enter,
        )  # fmt: skip
        coordinator = federation.start_coordinator()
        assert coordinator.wait() == 0, coordinator.output
        assert client.wait() == 0, client.output
        assert group is None or group.kills == 0
    heard = manager.heard()
    assert heard[0] == "READY=1"
    assert heard.count("WATCHDOG=1") >= 3
    assert heard[-1] == "STOPPING=1"
    rows = list(csv.DictReader((tmp_path / "run/clients.csv").read_text().splitlines()))
    assert len(rows) == 3
    assert all(0 < float(row["peak_memory_mb"]) < LIMIT_MB for row in rows)

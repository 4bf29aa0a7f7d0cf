"""A federation directory with real TLS, made by the command line, and connections to its broker."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from edgetrain.coordinator.broker import free_port
from edgetrain.edge_client.config import ClientConfig
from edgetrain.protocol.config import convert, read_toml
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport
from support.federation import ENVIRONMENT


def edgetrain(*arguments: object, status: int = 0) -> str:
    """Runs `edgetrain ARGUMENTS`, which has to end with `status`; what it says."""
    command = [sys.executable, "-m", "edgetrain", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


class EnrolledFederation:
    """`fed/` with its devices, each in a directory of its own as if on another machine."""

    def __init__(self, path: Path, bundle: Path, *names: str) -> None:
        self.path = path
        self.fed = path / "fed"
        self.port = free_port()
        edgetrain("init", self.fed, "--host", "127.0.0.1", "--port", self.port, "--bundle", bundle)
        for name in names:
            self.enroll(name)

    def enroll(self, name: str, *options: object) -> Path:
        """The device's directory."""
        device = self.path / name
        device.mkdir(exist_ok=True)
        edgetrain("enroll", name, "--dir", self.fed, "--output", device, *options)
        return device

    def revoke(self, name: str) -> None:
        edgetrain("revoke", name, "--dir", self.fed)

    def device(self, name: str) -> ClientConfig:
        path = self.path / name / f"{name}.toml"
        return convert(read_toml(path), ClientConfig, where=str(path))

    def broker_of_coordinator(self) -> BrokerConfig:
        tables = tomllib.loads((self.fed / "federation.toml").read_text())
        return msgspec.convert(tables["broker"], BrokerConfig)

    def connect(self, who: str, **changes: Any) -> MqttTransport:
        """A connection as a device, or as the coordinator."""
        config = self.broker_of_coordinator() if who == "coordinator" else self.device(who).broker
        config = msgspec.structs.replace(config, connect_timeout_seconds=0.0, **changes)
        return MqttTransport(config, client_id=f"test/{who}")

    def secrets(self) -> list[bytes]:
        """Private keys and passwords, in every form in which they stand in files."""
        found = []
        for file in self.path.glob("*/*.toml"):
            tables = tomllib.loads(file.read_text())
            found += [tables.get("broker", {}).get("password", "").encode()]
            found += tables.get("broker", {}).get("tls_key", "").encode().splitlines()[1:-1]
            if key := tables.get("signing_key", ""):
                found += [key.encode(), bytes.fromhex(key)]
        for file in self.fed.glob("*.key"):
            data = file.read_bytes()
            found += data.splitlines()[1:-1] if data.startswith(b"-----") else [data, data.hex().encode()]
        return [secret for secret in found if len(secret) > 20]
